"""From logits to the next tokens, and their log probabilities.

The order is vLLM's: log probabilities of the model's own logits; then bias, `min_tokens`, penalties and what guidance
allows; temperature; min-p, top-k, top-p; and one draw. Every row is treated alone, in token order, and has a generator
of its own: what a sequence gets does not depend on what else is in the batch. Legend: L rows of the step, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from foveal.engine.outputs import Logprob, Logprobs
from foveal.engine.params import SamplingParams
from foveal.engine.penalties import TokenCounts, penalise
from foveal.engine.request import SequenceState
from foveal.kernels.transfer import send, upload

DecodeToken = Callable[[int], str]

# Tokens sorted first to find a nucleus; it nearly always lies within.
_SHORTLIST = 1024
# Rows whose log probabilities are computed at a time: the logits of a whole prompt are not copied.
_TILE_ROWS = 128


class Sampler:
    """Chooses tokens for one model. `eos_ids` end a sequence unless it ignores them."""

    def __init__(self, eos_ids: Collection[int] = (), decode_token: DecodeToken | None = None) -> None:
        self._eos_ids = frozenset(eos_ids)
        self._decode_token = decode_token

    def sample(
        self,
        logits_LV: Tensor,
        sequences: Sequence[SequenceState],
        allowed: Sequence[Tensor | None] | None = None,
    ) -> list[int | None]:
        """The next token of each sequence from its row of logits (float32 [L, V]; unchanged); None where the largest of
        them is infinite or NaN.

        `allowed`: for each row the tokens to choose from, bool [V], or None: all.
        """
        sound_L = logits_LV.amax(dim=-1).isfinite()
        allowed = allowed or [None] * len(sequences)
        if any(one is not None for one in allowed) or any(_changes_logits(sequence) for sequence in sequences):
            logits_LV = logits_LV.clone()
            for logits_V, sequence, allowed_V in zip(logits_LV, sequences, allowed, strict=True):
                self._process(logits_V, sequence)
                if allowed_V is not None:
                    logits_V.masked_fill_(~send(allowed_V, logits_V.device), -torch.inf)
        tokens_L = logits_LV.argmax(dim=-1)
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
        if drawn:
            rows_L = upload(drawn, logits_LV.device)
            tokens_L.index_copy_(0, rows_L, _draw(logits_LV[rows_L], [sequences[row] for row in drawn]))
        # Here the host waits for the device, once a step.
        return [None if token < 0 else token for token in torch.where(sound_L, tokens_L, -1).cpu().tolist()]

    def logprobs(self, logits_LV: Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
        """For each row the `count` likeliest tokens and the given one, by the model's own logits (float [L, V]).

        Beside the logits this takes memory for some rows of them at a time, not for all.
        """
        entries: list[Logprobs] = []
        for start in range(0, len(tokens), _TILE_ROWS):
            tile = slice(start, start + _TILE_ROWS)
            entries += self._tile_logprobs(logits_LV[tile], tokens[tile], count)
        return entries

    def _tile_logprobs(self, logits_LV: Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
        logprobs_LV = logits_LV.log_softmax(dim=-1, dtype=torch.float32)
        tokens_L1 = torch.tensor(tokens, device=logits_LV.device).unsqueeze(1)
        chosen_L1 = logprobs_LV.gather(1, tokens_L1)
        ranks_L = (logprobs_LV > chosen_L1).sum(dim=-1) + 1
        top = logprobs_LV.topk(count, dim=-1)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        entries = [
            {token: self._logprob(token, value, rank) for rank, (token, value) in enumerate(zip(*row, strict=True), 1)}
            for row in rows
        ]
        for entry, token, value, rank in zip(entries, tokens, chosen_L1[:, 0].tolist(), ranks_L.tolist(), strict=True):
            entry.setdefault(token, self._logprob(token, value, rank))
        return entries

    def _logprob(self, token: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, self._decode_token(token) if self._decode_token else None)

    def _process(self, logits_V: Tensor, sequence: SequenceState) -> None:
        """Bias, `min_tokens` and penalties, in place."""
        params = sequence.params
        if params.logit_bias:  # all at once: there may be one for every token
            values = upload(list(params.logit_bias.values()), logits_V.device, logits_V.dtype)
            logits_V.index_add_(0, upload(list(params.logit_bias), logits_V.device), values)
        if sequence.output_length < params.min_tokens:
            logits_V.index_fill_(0, upload(self.ends(params), logits_V.device), -torch.inf)
        if params.penalised:
            if sequence.counts is None:
                length = sequence.request.prompt_length
                sequence.counts = TokenCounts(length, logits_V.numel(), logits_V.device)
            sequence.counts.update(sequence.tokens)
            penalise(logits_V, params, sequence.counts)

    def ends(self, params: SamplingParams) -> list[int]:
        """Tokens that end a sequence, and so cannot be chosen before `min_tokens`."""
        return sorted({*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._eos_ids)})


def _changes_logits(sequence: SequenceState) -> bool:
    params = sequence.params
    return params.penalised or bool(params.logit_bias) or sequence.output_length < params.min_tokens


def _draw(logits_LV: Tensor, sequences: Sequence[SequenceState]) -> Tensor:
    """One token a row (int64 [L]) from the distribution that its sequence asks for.

    By inversion: the first token at which the cumulated probability exceeds a uniform number of the sequence's
    generator.
    """
    logits_LV = _filtered(logits_LV, [sequence.params for sequence in sequences])
    cumulated_LV = logits_LV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    uniform = [torch.rand((), generator=sequence.generator, dtype=torch.float64) for sequence in sequences]
    total_L = cumulated_LV[:, -1]
    # Rounding must not reach the total, above which there is no token.
    uniform_L = send(torch.stack(uniform), total_L.device)
    target_L = torch.minimum(uniform_L * total_L, total_L.nextafter(torch.zeros_like(total_L)))
    return torch.searchsorted(cumulated_LV, target_L.unsqueeze(1), right=True)[:, 0]


def _filtered(logits_LV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits over temperature, and -inf for tokens that min-p, top-k or top-p leaves out."""

    def per_row(values: Sequence[float], rows: Sequence[int] | None = None) -> Tensor:
        chosen = values if rows is None else [values[row] for row in rows]
        return send(torch.tensor(chosen), logits_LV.device).unsqueeze(1)

    # The largest becomes 0, so that no temperature makes it infinite.
    logits_LV = logits_LV - logits_LV.amax(dim=-1, keepdim=True)
    logits_LV = logits_LV / per_row([one.temperature for one in params])
    if any(one.min_p > 0 for one in params):
        logits_LV = logits_LV.masked_fill(logits_LV < per_row([one.min_p for one in params]).log(), -torch.inf)
    rows = [row for row, one in enumerate(params) if one.top_k > 0]
    if rows:
        rows_L, limits_L1 = per_row(rows)[:, 0], per_row([min(one.top_k, logits_LV.shape[1]) for one in params], rows)
        logits_LV.index_copy_(0, rows_L, _top(logits_LV[rows_L], limits_L1))
    rows = [row for row, one in enumerate(params) if one.top_p < 1.0]
    if rows:
        rows_L, top_p_L1 = per_row(rows)[:, 0], per_row([one.top_p for one in params], rows)
        logits_LV.index_copy_(0, rows_L, _top(logits_LV[rows_L], _nucleus_sizes(logits_LV[rows_L], top_p_L1)))
    return logits_LV


def _top(logits_LV: Tensor, sizes_L1: Tensor) -> Tensor:
    """Each row with only its sizes_L1 (int64, 1 to V) largest values left, the others -inf; of equal ones the first."""
    # A GPU sorts them all rather than let the host wait for the largest size.
    most = logits_LV.shape[1] if logits_LV.is_cuda else int(sizes_L1.max())
    largest_LK = logits_LV.topk(most, dim=-1).values
    least_L1 = largest_LK.gather(1, sizes_L1 - 1)
    above_LV = logits_LV > least_L1
    equal_LV = logits_LV == least_L1
    places_L1 = sizes_L1 - above_LV.sum(dim=-1, keepdim=True)
    kept_LV = above_LV | (equal_LV & (equal_LV.cumsum(dim=-1) <= places_L1))
    return logits_LV.masked_fill(~kept_LV, -torch.inf)


def _nucleus_sizes(logits_LV: Tensor, top_p_L1: Tensor) -> Tensor:
    """How many likeliest tokens of each row it takes for probabilities of at least top_p in sum (int64 [L, 1])."""
    probabilities_LV = logits_LV.softmax(dim=-1)
    vocabulary = logits_LV.shape[1]
    for size in (vocabulary,) if logits_LV.is_cuda else (min(_SHORTLIST, vocabulary), vocabulary):
        sorted_LK = probabilities_LV.topk(size, dim=-1).values
        summed_LK = sorted_LK.cumsum(dim=-1, dtype=torch.float64)
        if size == vocabulary or bool((summed_LK[:, -1:] >= top_p_L1).all()):
            break
    return (summed_LK < top_p_L1).sum(dim=-1, keepdim=True).add(1).clamp(max=vocabulary)
