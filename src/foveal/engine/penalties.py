"""Penalties for tokens that were there before."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.engine.params import SamplingParams
from foveal.kernels.transfer import upload


class TokenCounts:
    """Which tokens a sequence holds, brought up to date with the tokens that are new since the last time."""

    def __init__(self, prompt_length: int, vocab_size: int, device: torch.device) -> None:
        self._prompt_length = prompt_length
        self._counted = 0
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        """bool [V]: in the prompt or in the output."""
        self.output_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        """float32 [V]: times in the output."""

    def update(self, tokens: Sequence[int]) -> None:
        """Count the tokens that were added; `tokens` are the prompt's and the output's."""
        new_N = upload(tokens[self._counted :], self.seen_V.device)
        self.seen_V.index_fill_(0, new_N, True)
        of_output_N = new_N[max(0, self._prompt_length - self._counted) :]
        self.output_V.index_add_(0, of_output_N, torch.ones_like(of_output_N, dtype=torch.float32))
        self._counted = len(tokens)


def penalise(logits_V: Tensor, params: SamplingParams, counts: TokenCounts) -> None:
    """Change the logits (float32 [V]) of tokens that were there before, in place.

    Repetition as in CTRL (arXiv 1909.05858, section 4.1; positive logits divided, negative multiplied), frequency and
    presence as in OpenAI's API: logit - frequency * count - presence * (count > 0).
    """
    if params.repetition_penalty != 1.0:
        penalty = params.repetition_penalty
        weaker_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        logits_V.copy_(torch.where(counts.seen_V, weaker_V, logits_V))
    logits_V.sub_(counts.output_V, alpha=params.frequency_penalty)
    logits_V.sub_((counts.output_V > 0).float(), alpha=params.presence_penalty)
