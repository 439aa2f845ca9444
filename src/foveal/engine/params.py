"""`SamplingParams`: what a caller may ask of one request."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.engine.guidance import Guidance

_GREEDY_BELOW = 1e-5
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0
"""Of `repetition_penalty`: beyond them no logit keeps a meaning, and soon none is finite."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; the names and defaults are vLLM's.

    Raises ValueError naming the field and the value where one is out of range, and TypeError for an unknown name.
    """

    n: int = 1
    """Completions of the prompt; the prompt is computed once."""
    temperature: float = 1.0
    """Logits are divided by it; 0 (or less than 1e-5): always the likeliest token, of equal ones the lowest id."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 or -1: all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the output so far."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as it is in the output so far."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output (arXiv 1909.05858); 0.01 to
    100."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; -100 to 100."""
    stop: str | Sequence[str] | None = None
    """Strings that end the text; the text ends before the first of them."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output. As with the end-of-sequence token, `token_ids` includes it and `text` does not."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    max_tokens: int | None = 16
    """Most tokens of a completion; None: as many as fit."""
    min_tokens: int = 0
    """No end-of-sequence token, stop token or stop string counts before this many tokens."""
    seed: int | None = None
    """Makes the request repeatable, alone and in any batch."""
    logprobs: int | None = None
    """Log probabilities of this many likeliest tokens, and of the chosen one, for each token of the output.

    They are of the model's own distribution: before bias, penalties and temperature."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    selection: bool = False
    """For each token of the output, which earlier positions each sparse layer attended to, and its recall. Costs one
    dense glance a token and layer."""
    guidance: Guidance | None = None
    """What the text must look like. It ends where nothing can follow, even with `ignore_eos`."""

    def __post_init__(self) -> None:
        self._check_whole("n", 1)
        self._check_number("temperature", 0.0)
        self._check_number("top_p", 0.0, 1.0)
        self._check(self.top_p > 0, "top_p", "above 0")
        self._check_whole("top_k", -1)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_number("repetition_penalty", LEAST_PENALTY, MOST_PENALTY)
        self._check(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")
        self._check(isinstance(self.selection, bool), "selection", "True or False")
        self._check_whole("min_tokens", 0)
        self._check_whole("max_tokens", 1, optional=True)
        self._check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens = {self.max_tokens}",
        )
        self._check(self.seed is None or _is_whole(self.seed), "seed", "a whole number")
        self._check_whole("logprobs", 0, optional=True)
        self._check_whole("prompt_logprobs", 0, optional=True)
        self._check_logit_bias()
        self._check_stops()
        self._check(self.guidance is None or isinstance(self.guidance, Guidance), "guidance", "a Guidance")
        if self.guidance and self.min_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} cannot be kept with guidance, which says when to end")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, always as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _check_logit_bias(self) -> None:
        bias = self.logit_bias
        good = bias is None or (
            isinstance(bias, Mapping)
            and all(_is_whole(token) and token >= 0 for token in bias)
            and all(_is_number(value) and -100 <= value <= 100 for value in bias.values())
        )
        self._check(good, "logit_bias", "token ids with numbers from -100 to 100")

    def _check_stops(self) -> None:
        strings = self.stop if self.stop is None or isinstance(self.stop, str | Sequence) else (None,)
        strings = (strings,) if isinstance(strings, str) else tuple(strings or ())
        self._check(all(isinstance(text, str) and text for text in strings), "stop", "non-empty text or a list of it")
        ids = self.stop_token_ids
        good = ids is None or (isinstance(ids, Sequence) and all(_is_whole(token) and token >= 0 for token in ids))
        self._check(good, "stop_token_ids", "a list of token ids")

    def _check_whole(self, name: str, least: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        good = (optional and value is None) or (_is_whole(value) and value >= least)
        self._check(good, name, f"a whole number of at least {least}" + (" or None" if optional else ""))

    def _check_number(self, name: str, least: float, most: float = math.inf) -> None:
        value = getattr(self, name)
        bounds = f"a number of at least {least}" if most == math.inf else f"a number from {least} to {most}"
        self._check(_is_number(value) and least <= value <= most, name, bounds)

    def _check(self, good: bool, name: str, rule: str) -> None:
        if not good:
            raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
