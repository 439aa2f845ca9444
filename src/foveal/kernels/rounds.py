"""Packed sequences of different lengths in rounds: in each, the next few tokens of every sequence that has any left."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foveal.kernels.keys import Queries
from foveal.kernels.transfer import send

Chunk = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]
"""(inputs [S, N, ...] each, states [S, ...]) -> (outputs [S, N, ...], states). A token of zeros changes no state."""


def in_rounds(
    chunk: Chunk, inputs: Sequence[Tensor], state_S: Tensor, queries: Queries, size: int
) -> tuple[Tensor, Tensor]:
    """Outputs [T, ...] and final states [S, ...] of a recurrence, `size` tokens of each sequence at a time.

    inputs: [T, ...] each. Sequences whose tokens do not divide into rounds get tokens of zeros at the end.
    """
    if queries.single:
        out_S1, state_S = chunk([x_T[:, None] for x_T in inputs], state_S)
        return out_S1[:, 0], state_S
    lengths = queries.lengths
    size = min(size, max(lengths))
    inputs = [torch.cat((x_T, x_T.new_zeros(1, *x_T.shape[1:]))) for x_T in inputs]
    states, outputs, rows = list(state_S.unbind(0)), [], []
    for start in range(0, max(lengths), size):
        active = [s for s, length in enumerate(lengths) if length > start]
        row_sN = send(_rows(queries, active, start, size), state_S.device)
        out_sN, state_s = chunk([x_T[row_sN] for x_T in inputs], torch.stack([states[s] for s in active]))
        for s, state in zip(active, state_s.unbind(0), strict=True):
            states[s] = state
        outputs.append(out_sN.flatten(0, 1))
        rows.append(row_sN.flatten())
    row_X = torch.cat(rows)
    # Rows in the order of the batch; those past the last one are zeros that were added.
    order_T = row_X.argsort(stable=True)[: queries.offsets[-1]]
    return torch.cat(outputs)[order_T], torch.stack(states)


def _rows(queries: Queries, active: Sequence[int], start: int, size: int) -> Tensor:
    """int64 [active, size]: packed rows of the tokens from `start` on; where a sequence has no more, the row of zeros
    past the last one."""
    first_s1 = torch.tensor([[queries.offsets[s] + start] for s in active])
    stop_s1 = torch.tensor([[queries.offsets[s + 1]] for s in active])
    row_sN = first_s1 + torch.arange(size)
    return torch.where(row_sN < stop_s1, row_sN, queries.offsets[-1])
