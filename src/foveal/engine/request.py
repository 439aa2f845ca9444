"""Requests and their sequences: what was asked, and how far it has come."""

from dataclasses import dataclass, field
from hashlib import blake2b

import torch

from foveal.engine.detokenize import Detokenizer
from foveal.engine.guidance import Guide
from foveal.engine.look import TokenSelection
from foveal.engine.outputs import CompletionOutput, FinishReason, Logprobs, RequestOutput
from foveal.engine.params import SamplingParams
from foveal.engine.penalties import TokenCounts


@dataclass(eq=False)
class SequenceState:
    """One completion of a request in the making.

    `tokens` are all that are known, the prompt's first; the first `computed` of them are in the cache. There is no
    other notion of prefill or decoding: a sequence is ready for its next token when all it knows is computed.
    """

    request: "Request"
    index: int
    tokens: list[int]
    generator: torch.Generator
    detokenizer: Detokenizer | None = None
    guide: Guide | None = None
    computed: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    selections: list[TokenSelection] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    counts: TokenCounts | None = None
    """For penalties; made by the sampler when it first needs them."""

    @property
    def key(self) -> tuple[str, int]:
        """The sequence's name in the cache manager."""
        return self.request.id, self.index

    @property
    def params(self) -> SamplingParams:
        """The request's."""
        return self.request.params

    @property
    def missing(self) -> int:
        """Tokens known but not computed."""
        return len(self.tokens) - self.computed

    @property
    def output_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.request.prompt_length :]

    @property
    def output_length(self) -> int:
        """How many tokens there are after the prompt."""
        return len(self.tokens) - self.request.prompt_length

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """No token will follow."""
        self.finish_reason, self.stop_reason = reason, stop_reason

    def output(self) -> CompletionOutput:
        """The completion so far; while it goes on, without text that may yet turn out to begin a stop string."""
        wanted = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self._text(),
            token_ids=self.output_ids,
            cumulative_logprob=self.cumulative_logprob if wanted else None,
            logprobs=list(self.logprobs) if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            selection=list(self.selections) if self.params.selection else None,
        )

    def _text(self) -> str:
        if self.detokenizer is None:
            return ""
        return self.detokenizer.text if self.finished else self.detokenizer.safe_text


@dataclass(eq=False)
class Request:
    """What a caller asked for.

    `stream`: give an output after every step that brings a token, not only at the end. `cache_salt`: only requests with
    an equal one share prefixes with it. The engine fills in `sequences` when it takes the request.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    stream: bool = False
    cache_salt: str | None = None
    sequences: list[SequenceState] = field(default_factory=list)
    salt: tuple[str | None, int | None] = (None, None)
    """Prefixes are shared only under equal salts; see `reusable`."""
    forked: bool = False
    """Whether the sequences after the first have left it."""
    prompt_logprobs: list[Logprobs | None] = field(default_factory=lambda: [None])
    cached_tokens: int | None = None
    """Prompt tokens found in the cache; None: not admitted yet."""
    error: str | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def finished(self) -> bool:
        """Whether all its sequences are."""
        return all(sequence.finished for sequence in self.sequences)

    @property
    def reusable(self) -> bool:
        """Whether it may share prefixes: a hit would skip rows whose log probabilities are wanted."""
        return self.params.prompt_logprobs is None

    @property
    def next_prompt_row(self) -> int | None:
        """The first prompt position whose log probabilities are still to come; None: none is."""
        row = len(self.prompt_logprobs) - 1
        return row if self.params.prompt_logprobs is not None and row < self.prompt_length - 1 else None

    def output(self) -> RequestOutput:
        """The request so far."""
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.finished,
            prompt_logprobs=None if self.params.prompt_logprobs is None else list(self.prompt_logprobs),
            error=self.error,
            num_cached_tokens=self.cached_tokens or 0,
        )


def seeded_generator(seed: int, index: int) -> torch.Generator:
    """A generator that depends on both numbers and on nothing else."""
    digest = blake2b(repr((seed, index)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
