"""From cumulative outputs to what is new in them."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from foveal.engine import CompletionOutput, Logprob, RequestOutput
from foveal.engine.look import TokenSelection
from foveal.engine.outputs import Logprobs
from foveal.server.look import ChoiceLook, LookSource, RequestLook


@dataclass(frozen=True)
class Piece:
    """What is new of one completion. `index` counts all completions of all prompts of a request."""

    index: int
    output: RequestOutput
    first: bool
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    selection: list[TokenSelection]
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None


@dataclass
class _Sent:
    characters: int = 0
    tokens: int = 0
    begun: bool = False
    ended: bool = False


class Progress:
    """What was sent already of the completions of some requests, given in their order."""

    def __init__(self, request_ids: Sequence[str], completions: int) -> None:
        self._first = {request_id: place * completions for place, request_id in enumerate(request_ids)}
        self._sent = [_Sent() for _ in range(len(request_ids) * completions)]

    def pieces(self, output: RequestOutput) -> Iterator[Piece]:
        """What this output has that no earlier one had; nothing of completions where nothing is new."""
        for choice in output.outputs:
            index = self._first[output.request_id] + choice.index
            sent = self._sent[index]
            text = choice.text[sent.characters :]
            tokens = choice.token_ids[sent.tokens :]
            ending = choice.finish_reason is not None and not sent.ended
            wanted = choice.logprobs is not None or choice.selection is not None
            if not (text or ending or (wanted and tokens)):
                continue
            yield Piece(
                index=index,
                output=output,
                first=not sent.begun,
                text=text,
                token_ids=tokens,
                logprobs=(choice.logprobs or [])[sent.tokens :],
                selection=(choice.selection or [])[sent.tokens :],
                finish_reason=_reason(choice),
                stop_reason=choice.stop_reason,
            )
            self._sent[index] = _Sent(len(choice.text), len(choice.token_ids), True, ending)


def _reason(choice: CompletionOutput) -> Literal["stop", "length"] | None:
    """Failed and aborted requests never come here."""
    return cast(Literal["stop", "length"] | None, choice.finish_reason)


def likeliest(entry: Logprobs, count: int) -> list[tuple[int, Logprob]]:
    """The entry's `count` likeliest tokens, without the one that is there whatever its rank."""
    return [(token, logprob) for token, logprob in entry.items() if logprob.rank <= count][:count]


class Looks:
    """`foveal` of an answer with so many completions; nothing unless `wanted`."""

    def __init__(self, source: LookSource, *, wanted: bool, completions: int) -> None:
        self._source = source
        self._wanted = wanted
        self._choices = [source.choice() for _ in range(completions)]

    def once(self, output: RequestOutput) -> RequestLook | None:
        """For the answer, or the first event of a stream."""
        wanted, self._wanted = self._wanted, False
        return self._source.request(output.prompt_token_ids) if wanted else None

    def of(self, piece: Piece) -> ChoiceLook | None:
        """For the piece's tokens."""
        if not piece.selection:
            return None
        return self._choices[piece.index].add(piece.token_ids, piece.selection)


class Offsets:
    """Where in a growing text each of its tokens begins, in characters; a token may begin inside one.

    `skipped`: characters of the first tokens that the text has not: SentencePiece begins every text with a space.
    """

    def __init__(self, skipped: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = -skipped

    def add(self, token: bytes) -> int:
        """The next token's place."""
        place = max(0, self._length)
        self._length += len(self._decoder.decode(token))
        return place
