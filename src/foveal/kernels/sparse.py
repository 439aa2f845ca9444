"""Attention over a selection: reads only the selected rows."""

import torch
from torch import Tensor

from foveal.kernels.dense import softmax_attention, widened
from foveal.kernels.dispatch import operation
from foveal.kernels.keys import Columns, KeySource, Queries

# Numbers gathered for one tile of queries: on a CPU more would spill out of the cache between the gather and the
# product; a GPU has enough to do with these, and they are 128 MiB in float32.
TILE_GATHER = {"cpu": 1 << 19, "cuda": 1 << 25}
# And at most so many queries: of grids, one side may have 65535 blocks.
TILE_QUERIES = 1 << 12


@operation(differentiable=True)
def sparse_attention(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> Tensor:
    """Attention of each query over the key positions that were selected for it, the same for all heads.

    q_THP: [T, H, P]. keys and values: rows [G, P] and [G, V]; H is a multiple of G. Absorbed MLA passes its latents as
    one head's keys, and their first columns as values (`OneHead`, `Columns`): each row is then read once.
    selection_TK: int32 [T, K], distinct positions in the query's sequence, -1 (none) last.
    Returns [T, H, V] in q's dtype, zeros where nothing is selected. Softmax of scale * q.k in float32.
    Raises ValueError where a selection names a position that its sequence does not have, or one after a -1, or has no
    columns.
    """
    check_selection(selection_TK, keys, queries)
    outputs = []
    for s, (row, count, _) in enumerate(queries):
        length = keys.contexts.lengths[s]
        k_NGP, v_NGV = keys.context(s, 0, length), values.context(s, 0, length)
        group = q_THP.shape[1] // k_NGP.shape[1]
        for t in range(row, row + count):
            chosen_K = selection_TK[t][selection_TK[t] >= 0].long()
            k_KHP, v_KHV = (x[chosen_K].repeat_interleave(group, 1) for x in (k_NGP, v_NGV))
            weights_HK = (widened(torch.einsum("hp,khp->hk", q_THP[t], k_KHP)) * scale).softmax(-1)
            outputs.append(torch.einsum("hk,khv->hv", weights_HK.to(v_KHV), v_KHV))
    return torch.stack(outputs).to(q_THP)


@sparse_attention.add("torch", differentiable=True)
def _sparse_gathered(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> Tensor:
    check_selection(selection_TK, keys, queries)
    tile = gathered_queries(selection_TK, q_THP.shape[-1])
    parts = []
    for s, (row, count, _) in enumerate(queries):
        for lower in range(row, row + count, tile):
            rows = slice(lower, min(lower + tile, row + count))
            parts.append(_sparse_tile(q_THP[rows], keys, values, s, selection_TK[rows], scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sparse_tile(
    q_tHP: Tensor, keys: KeySource, values: KeySource, sequence: int, chosen_tK: Tensor, scale: float
) -> Tensor:
    """Attention of a few queries of one sequence: the heads of a group are rows of one matrix product."""
    # -1 stands last: otherwise every entry is a position. On a GPU the host does not wait to know.
    missing_tK = chosen_tK < 0 if chosen_tK.is_cuda or int(chosen_tK[:, -1].amin()) < 0 else None
    chosen_tK = chosen_tK.clamp_min(0)
    k_tKGP = keys.select(sequence, chosen_tK)
    if isinstance(values.records, Columns) and values.records.records is keys.records:
        v_tKGV = k_tKGP[..., : values.records.count]
    else:
        v_tKGV = values.select(sequence, chosen_tK)
    count, _, groups, _ = k_tKGP.shape
    q_XQP = q_tHP.unflatten(1, (groups, -1)).flatten(0, 1)
    k_XKP, v_XKV = (x.transpose(1, 2).flatten(0, 1) for x in (k_tKGP, v_tKGV))
    if missing_tK is None:
        return softmax_attention(q_XQP, k_XKP, v_XKV, None, scale).unflatten(0, (count, groups)).flatten(1, 2)
    # A query without any entry sees one for the time being: a softmax over nothing is NaN, in its gradient too.
    nothing_t1 = missing_tK.all(1, keepdim=True)
    mask_X1K = (nothing_t1 | ~missing_tK).repeat_interleave(groups, 0)[:, None]
    out_XQV = softmax_attention(q_XQP, k_XKP, v_XKV, mask_X1K, scale)
    return out_XQV.unflatten(0, (count, groups)).flatten(1, 2).masked_fill(nothing_t1[:, None], 0.0)


def gathered_queries(selection_TK: Tensor, width: int) -> int:
    """How many queries make a tile, whose selected rows of `width` numbers are gathered together."""
    most = TILE_GATHER[selection_TK.device.type] // max(1, selection_TK.shape[1] * width)
    return max(1, min(most, TILE_QUERIES))


def check_selection_shape(selection_TK: Tensor, queries: int) -> None:
    """Raise ValueError unless this is [queries, K] with at least one column."""
    if selection_TK.dim() != 2 or selection_TK.shape[0] != queries or selection_TK.shape[1] < 1:
        raise ValueError(f"selection has shape {tuple(selection_TK.shape)}, not [{queries}, K] with K >= 1")


def check_selection(selection_TK: Tensor, keys: KeySource, queries: Queries) -> None:
    """Raise ValueError unless each row is positions that its sequence has, and then -1. What a GPU holds is not looked
    at: the host would have to wait for it."""
    check_selection_shape(selection_TK, queries.offsets[-1])
    if selection_TK.is_cuda:
        return
    lengths_S = torch.tensor(keys.contexts.lengths, device=selection_TK.device)
    counts_S = torch.tensor(queries.lengths, device=selection_TK.device)
    length_T1 = lengths_S.repeat_interleave(counts_S)[:, None]
    wrong_TK = (selection_TK < -1) | (selection_TK >= length_T1)
    late_TK = torch.zeros_like(wrong_TK)
    late_TK[:, 1:] = (selection_TK[:, 1:] >= 0) & (selection_TK[:, :-1] < 0)
    if not (wrong_TK | late_TK).any():
        return
    query, place = (wrong_TK | late_TK).nonzero()[0].tolist()
    what = f"the selection of query {query} has position {int(selection_TK[query, place])}"
    if wrong_TK[query, place]:
        raise ValueError(f"{what}, but its sequence has {int(length_T1[query])} keys")
    raise ValueError(f"{what} after a -1")
