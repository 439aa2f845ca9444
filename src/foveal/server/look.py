"""The `foveal` extension of the completion endpoints: what a model attended to, as pydantic models.

docs/serving-look.md describes it for clients. Nothing here is computed for requests that do not ask.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from foveal.engine.look import LayerSight, TokenSelection

TokenBytes = Callable[[int], bytes]
CacheBytes = Callable[[int], int]


class FovealOptions(BaseModel):
    """`foveal` in a request: what is beyond OpenAI's interface."""

    model_config = ConfigDict(extra="forbid", strict=True)

    selection: bool | None = Field(
        None, description="For every token of the answer, which earlier tokens were attended to."
    )


class SeenToken(BaseModel):
    """A token of the sequence. The texts of all tokens, joined, are the whole text: a character made of several tokens
    belongs to the last of them."""

    id: int
    text: str
    special: bool = Field(description="Belongs to the chat template, not to the text.")


class NarrowLayer(BaseModel):
    """A layer that does not attend to every earlier token."""

    layer: int = Field(description="Counted from 0.")
    kind: Literal["sparse", "window"] = Field(description="An indexer picks the tokens, or they are the latest ones.")
    reach: int = Field(description="Most tokens that it attends to.")


class RequestLook(BaseModel):
    """`foveal` of an answer, or of the first event of a stream."""

    layers: list[NarrowLayer] = Field(description="First to last; empty: the model leaves nothing out.")
    dense_layers: int = Field(description="How many layers attend to every earlier token.")
    recurrent_layers: int = Field(description="How many layers keep a state instead of a cache.")
    prompt: list[SeenToken]


class LookedToken(SeenToken):
    """A token of the answer and what was attended to when it was chosen."""

    position: int = Field(description="In the sequence, the prompt included; so many tokens could be attended to.")
    layers: list[list[int]] = Field(
        description="For each of the request's `layers` the positions attended to, as runs: [0, 4, 7, 8] is 0-3 and 7."
    )
    recall: list[float | None] = Field(
        description="For each of them the share of its dense attention, averaged over heads, that falls on these "
        "positions; null: not known (a window, or a selection that belongs to an earlier layer)."
    )
    cache_bytes: int = Field(description="What the sequence's cache takes once this token is in it, in whole pages.")


class ChoiceLook(BaseModel):
    """`foveal` of a choice: its tokens, or in a stream the new ones."""

    tokens: list[LookedToken]


class TokenTexts:
    """The text that each token of a sequence adds."""

    def __init__(self, token_bytes: TokenBytes, special_ids: Collection[int]) -> None:
        self._token_bytes = token_bytes
        self._special_ids = special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> SeenToken:
        """The sequence's next token."""
        text = self._decoder.decode(self._token_bytes(token))
        return SeenToken(id=token, text=text, special=token in self._special_ids)


class LookSource:
    """What looks of one model are made from. `cache_bytes`: of a sequence of so many tokens."""

    def __init__(
        self,
        sights: Sequence[LayerSight],
        token_bytes: TokenBytes,
        special_ids: Collection[int],
        cache_bytes: CacheBytes,
    ) -> None:
        self.narrow = [
            NarrowLayer(layer=sight.layer, kind=sight.kind, reach=sight.reach)
            for sight in sights
            if sight.reach is not None and (sight.kind == "sparse" or sight.kind == "window")
        ]
        self._kinds = [sight.kind for sight in sights]
        self._token_bytes = token_bytes
        self._special_ids = special_ids
        self.cache_bytes = cache_bytes

    def request(self, prompt_ids: Sequence[int]) -> RequestLook:
        """What holds for all choices of a request."""
        texts = self.texts()
        return RequestLook(
            layers=self.narrow,
            dense_layers=self._kinds.count("dense"),
            recurrent_layers=self._kinds.count("recurrent"),
            prompt=[texts.add(token) for token in prompt_ids],
        )

    def choice(self) -> "ChoiceLooks":
        """For a choice's tokens as they come."""
        return ChoiceLooks(self)

    def texts(self) -> TokenTexts:
        """For a sequence that begins here."""
        return TokenTexts(self._token_bytes, self._special_ids)


class ChoiceLooks:
    """Makes the looks of one choice, piece by piece."""

    def __init__(self, source: LookSource) -> None:
        self._source = source
        self._texts = source.texts()

    def add(self, token_ids: Sequence[int], selections: Sequence[TokenSelection]) -> ChoiceLook:
        """The choice's next tokens, with what `CompletionOutput.selection` says of them."""
        return ChoiceLook(tokens=[self._token(*pair) for pair in zip(token_ids, selections, strict=True)])

    def _token(self, token: int, selection: TokenSelection) -> LookedToken:
        runs, recall = iter(selection.layers), iter(selection.recall)
        layers: list[list[int]] = []
        known: list[float | None] = []
        for layer in self._source.narrow:
            if layer.kind == "sparse":
                layers.append(list(next(runs)))
                known.append(next(recall))
            else:
                layers.append([max(0, selection.seen - layer.reach), selection.seen])
                known.append(None)
        return LookedToken(
            **self._texts.add(token).model_dump(),
            position=selection.seen,
            layers=layers,
            recall=known,
            cache_bytes=self._source.cache_bytes(selection.seen + 1),
        )
