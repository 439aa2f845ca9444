"""What a request answers with; shaped like vLLM's outputs."""

from dataclasses import dataclass
from typing import Literal

from foveal.engine.look import TokenSelection

FinishReason = Literal["stop", "length", "error", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural log probability, its rank (1: the likeliest) and its text (None: no tokenizer)."""

    logprob: float
    rank: int
    decoded_token: str | None


Logprobs = dict[int, Logprob]
"""By token id: the tokens asked about, likeliest first, then the token that is there if it is not among them."""


@dataclass(frozen=True)
class CompletionOutput:
    """One completion, from its first token to the latest.

    `logprobs` and `selection` have one entry a token, and `cumulative_logprob` is the sum over the tokens; all are None
    unless asked for. `finish_reason` is None while it goes on, "stop" (end-of-sequence, a stop token or a stop string;
    `stop_reason` is None, the id or the string), "length", "error" or "abort".
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    selection: list[TokenSelection] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request's state: all its completions so far.

    `prompt_logprobs` has one entry a prompt token, None for the first. `num_cached_tokens` are prompt tokens that the
    prefix cache had. `error` says in words why the request could not be finished.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Logprobs | None] | None = None
    error: str | None = None
    num_cached_tokens: int = 0
