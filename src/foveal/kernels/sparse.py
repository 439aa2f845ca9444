"""Attention over a selection: reads only the selected rows."""

import torch
from torch import Tensor

from foveal.kernels.dense import softmax_attention, widened
from foveal.kernels.dispatch import operation
from foveal.kernels.keys import KeySource, Queries

# Numbers gathered for one tile of queries; more would spill out of the cache between the gather and the product.
TILE_GATHER = 1 << 19


@operation(differentiable=True)
def sparse_attention(
    q_THP: Tensor, keys: KeySource, value_dim: int, selection_TK: Tensor, queries: Queries, *, scale: float
) -> Tensor:
    """Attention of each query over the key positions that were selected for it.

    q_THP: [T, H, P]. keys: rows [P] shared by all heads; a row's first `value_dim` numbers are its value (absorbed MLA:
    P = C + R, value_dim = C). selection_TK: int32 [T, K] positions in the query's sequence, -1 = none; at least one
    a row.
    Returns [T, H, value_dim] in q's dtype. Softmax in float32.
    """
    outputs = []
    for s, (row, count, _) in enumerate(queries):
        context_NP = keys.context(s, 0, keys.contexts.lengths[s])
        for t in range(row, row + count):
            k_KP = context_NP[selection_TK[t][selection_TK[t] >= 0].long()]
            weights_HK = (widened(torch.einsum("hp,kp->hk", q_THP[t], k_KP)) * scale).softmax(-1)
            outputs.append(weights_HK.to(k_KP) @ k_KP[:, :value_dim])
    return torch.stack(outputs).to(q_THP)


@sparse_attention.add("torch", differentiable=True)
def _sparse_gathered(
    q_THP: Tensor, keys: KeySource, value_dim: int, selection_TK: Tensor, queries: Queries, *, scale: float
) -> Tensor:
    tile = max(1, TILE_GATHER // (selection_TK.shape[1] * q_THP.shape[-1]))
    parts = []
    for s, (row, count, _) in enumerate(queries):
        for lower in range(row, row + count, tile):
            chosen_tK = selection_TK[lower : min(lower + tile, row + count)]
            mask_t1K = None
            if int(chosen_tK[:, -1].amin()) < 0:  # -1 stands last: otherwise every entry is a position
                mask_t1K = (chosen_tK >= 0)[:, None]
                chosen_tK = chosen_tK.clamp_min(0)
            k_tKP = keys.select(s, chosen_tK)
            q_tHP = q_THP[lower : lower + len(chosen_tK)]
            parts.append(softmax_attention(q_tHP, k_tKP, k_tKP[..., :value_dim], mask_t1K, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
