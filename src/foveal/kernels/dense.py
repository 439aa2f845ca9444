"""Dense causal attention: grouped-query over per-head keys, and absorbed MLA (one key row for all heads)."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from foveal.kernels.dispatch import operation
from foveal.kernels.keys import KeySource, Queries

# Scores of one tile of queries: small enough to stay in a level-two or -three cache, large enough to keep matrix
# products busy.
TILE_SCORES = 1 << 20


@operation(differentiable=True)
def attention(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int | None = None,
    selection_TK: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries over the keys of their sequences.

    q_THP: [T, H, P]. keys and values: rows [G, P] and [G, V]; H is a multiple of G. A query at position i sees key
    positions j <= i, of these the last `window`, and of these what `selection_TK` (int32 [T, K], -1 = none) names: with
    a selection this is the *masked* form, dense in work; `sparse_attention` reads only what was selected.
    Softmax of scale * q.k in float32. Returns [T, H, V] in q's dtype.
    """
    outputs = []
    for s, (row, count, first) in enumerate(queries):
        k_NGP = keys.context(s, 0, keys.contexts.lengths[s])
        v_NGV = values.context(s, 0, values.contexts.lengths[s])
        group = q_THP.shape[1] // k_NGP.shape[1]
        k_NHP, v_NHV = k_NGP.repeat_interleave(group, 1), v_NGV.repeat_interleave(group, 1)
        for t in range(count):
            visible = torch.arange(max(0, first + t + 1 - window) if window else 0, first + t + 1, device=q_THP.device)
            if selection_TK is not None:
                visible = visible[torch.isin(visible, selection_TK[row + t])]
            scores_HN = widened(torch.einsum("hp,nhp->hn", q_THP[row + t], k_NHP[visible])) * scale
            out_HV = torch.einsum("hn,nhv->hv", scores_HN.softmax(-1).to(v_NHV), v_NHV[visible])
            outputs.append(out_HV)
    return torch.stack(outputs).to(q_THP)


@attention.add("torch", differentiable=True)
def _attention_tiled(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int | None = None,
    selection_TK: Tensor | None = None,
) -> Tensor:
    paged = keys.contexts.table_SB is not None
    if paged and queries.single and selection_TK is None and _worth_padding(keys.contexts.lengths, window):
        return _decode(q_THP, keys, values, scale, window)
    parts = []
    for s, (row, count, first) in enumerate(queries):
        start = max(0, first + 1 - window) if window else 0
        k_NGP, v_NGV = (source.context(s, start, first + count) for source in (keys, values))
        tile = max(1, TILE_SCORES // (q_THP.shape[1] * (first + count - start)))
        for lower in range(0, count, tile):
            upper = min(lower + tile, count)
            low = max(0, first + lower + 1 - window) - start if window else 0
            high = first + upper - start
            chosen_tK = None if selection_TK is None else selection_TK[row + lower : row + upper]
            mask_tN = _visible(first + lower, upper - lower, start + low, start + high, window, chosen_tK, q_THP.device)
            q_tHP = q_THP[row + lower : row + upper]
            parts.append(_tile(q_tHP, k_NGP[low:high], v_NGV[low:high], mask_tN, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _worth_padding(lengths: tuple[int, ...], window: int | None) -> bool:
    """Whether one product over all sequences, padded to the longest, reads little that nobody sees."""
    longest = max(lengths)
    seen = sum(length if window is None else min(length, window) for length in lengths)
    return len(lengths) > 1 and len(lengths) * longest <= 2 * seen


def _visible(
    position: int,
    count: int,
    start: int,
    stop: int,
    window: int | None,
    chosen_tK: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """bool [t, n]: which of the keys at [start, stop) the queries at [position, position + count) see; None: all."""
    if count == 1 and chosen_tK is None:
        return None
    key_N = torch.arange(start, stop, device=device)
    query_t = torch.arange(position, position + count, device=device)[:, None]
    mask_tN = key_N <= query_t
    if window:
        mask_tN &= key_N > query_t - window
    if chosen_tK is not None:
        # One column more, for "none".
        selected_tN = mask_tN.new_zeros(count, stop - start + 1)
        place_tK = torch.where(chosen_tK < 0, stop - start, chosen_tK - start)
        mask_tN &= selected_tN.scatter_(1, place_tK.long(), True)[:, :-1]
    return mask_tN


def _tile(q_tHP: Tensor, k_NGP: Tensor, v_NGV: Tensor, mask_tN: Tensor | None, scale: float) -> Tensor:
    """Attention of a few queries over one range of keys: heads of a group are rows of one matrix product."""
    count, heads, _ = q_tHP.shape
    groups = k_NGP.shape[1]
    q_GtP = q_tHP.unflatten(1, (groups, heads // groups)).permute(1, 2, 0, 3).flatten(1, 2)
    k_GNP, v_GNV = k_NGP.transpose(0, 1), v_NGV.transpose(0, 1)
    if mask_tN is not None:
        mask_tN = mask_tN.repeat(heads // groups, 1)
    out_GtV = softmax_attention(q_GtP, k_GNP, v_GNV, mask_tN, scale)
    return out_GtV.unflatten(1, (heads // groups, count)).permute(2, 0, 1, 3).flatten(1, 2)


def softmax_attention(q_XQP: Tensor, k_XNP: Tensor, v_XNV: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q.k) v for each x of X; mask: bool, broadcast over [X, Q, N], True = seen. Returns [X, Q, V].

    float32 scores are a plain matrix product, which the CPU's own fused attention does not reach. In bfloat16 a product
    would round them before the softmax, which the fused one does not; it wants values as wide as keys.
    """
    if q_XQP.dtype == torch.bfloat16:
        width = k_XNP.shape[-1]
        padded_XNV = v_XNV if v_XNV.shape[-1] == width else pad(v_XNV, (0, width - v_XNV.shape[-1]))
        mask = mask if mask is None or mask.dim() == 2 else mask[None]
        q, k, v = (x[None] for x in (q_XQP, k_XNP, padded_XNV))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0][..., : v_XNV.shape[-1]]
    scores_XQN = widened(torch.bmm(q_XQP, k_XNP.transpose(1, 2))) * scale
    if mask is not None:
        scores_XQN = scores_XQN.masked_fill(~mask, float("-inf"))
    return torch.bmm(scores_XQN.softmax(-1).to(v_XNV.dtype), v_XNV)


def widened(scores: Tensor) -> Tensor:
    """At least float32, for a softmax."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _decode(q_SHP: Tensor, keys: KeySource, values: KeySource, scale: float, window: int | None) -> Tensor:
    """One query a sequence: all sequences in one product, padded to the longest context behind a mask."""
    k_SGNP, v_SGNV = keys.padded(), values.padded()
    sequences, groups, longest, _ = k_SGNP.shape
    length_S = torch.tensor(keys.contexts.lengths, device=q_SHP.device)[:, None]
    position_N = torch.arange(longest, device=q_SHP.device)
    mask_SN = position_N < length_S
    if window:
        mask_SN &= position_N >= length_S - window
    q_XQP = q_SHP.unflatten(1, (groups, -1)).flatten(0, 1)
    k_XNP, v_XNV = k_SGNP.flatten(0, 1), v_SGNV.flatten(0, 1)
    mask_X1N = None if mask_SN.all() else mask_SN.repeat_interleave(groups, 0)[:, None]
    out_XQV = softmax_attention(q_XQP, k_XNP, v_XNV, mask_X1N, scale)
    return out_XQV.unflatten(0, (sequences, groups)).flatten(1, 2)
