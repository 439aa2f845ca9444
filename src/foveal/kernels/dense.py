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
    sinks: int = 0,
    selection_TK: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries over the keys of their sequences.

    q_THP: [T, H, P]. keys and values: rows [G, P] and [G, V]; H is a multiple of G. A query at position i sees key
    positions j <= i, of these the last `window` and the first `sinks` (StreamingLLM, arXiv 2309.17453), and of these
    what `selection_TK` (int32 [T, K], -1 = none) names: with a selection this is the *masked* form, dense in work;
    `sparse_attention` reads only what was selected.
    Softmax of scale * q.k in float32. Returns [T, H, V] in q's dtype.
    """
    outputs = []
    for s, (row, count, first) in enumerate(queries):
        k_NGP = keys.context(s, 0, keys.contexts.lengths[s])
        v_NGV = values.context(s, 0, values.contexts.lengths[s])
        group = q_THP.shape[1] // k_NGP.shape[1]
        k_NHP, v_NHV = k_NGP.repeat_interleave(group, 1), v_NGV.repeat_interleave(group, 1)
        for t in range(count):
            visible = torch.arange(first + t + 1, device=q_THP.device)
            if window:
                visible = visible[(visible > first + t - window) | (visible < sinks)]
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
    sinks: int = 0,
    selection_TK: Tensor | None = None,
) -> Tensor:
    if sinks < 0:
        raise ValueError(f"sinks must not be negative, not {sinks}")
    paged = keys.contexts.table_SB is not None
    if paged and queries.single and selection_TK is None and _worth_padding(keys.contexts.lengths, window):
        return _decode(q_THP, keys, values, scale, window, sinks)
    parts = []
    for s, (row, count, first) in enumerate(queries):
        stop = first + count
        start = max(0, first + 1 - window) if window else 0
        gap = max(0, start - sinks)  # keys that nobody sees, after the sinks
        k_NGP, v_NGV = (_around_gap(source, s, start, gap, stop) for source in (keys, values))
        position_N = torch.arange(len(k_NGP), device=q_THP.device)
        position_N[start - gap :] += gap
        tile = max(1, TILE_SCORES // (q_THP.shape[1] * len(k_NGP)))
        for lower in range(0, count, tile):
            upper = min(lower + tile, count)
            low, high = (max(0, first + lower + 1 - window - gap) if window else 0), first + upper - gap
            k_nGP, v_nGV, position_n = (_around(x, sinks, low, high) for x in (k_NGP, v_NGV, position_N))
            mask_tn = None
            if upper - lower > 1:
                query_t = torch.arange(first + lower, first + upper, device=q_THP.device)
                mask_tn = _visible(query_t, position_n, window, sinks)
            if selection_TK is not None:
                selected_tn = _selected(selection_TK[row + lower : row + upper], position_n, stop)
                mask_tn = selected_tn if mask_tn is None else mask_tn & selected_tn
            parts.append(_tile(q_THP[row + lower : row + upper], k_nGP, v_nGV, mask_tn, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _worth_padding(lengths: tuple[int, ...], window: int | None) -> bool:
    """Whether one product over all sequences, padded to the longest, reads little that nobody sees."""
    longest = max(lengths)
    seen = sum(length if window is None else min(length, window) for length in lengths)
    return len(lengths) > 1 and len(lengths) * longest <= 2 * seen


def _around_gap(source: KeySource, sequence: int, start: int, gap: int, stop: int) -> Tensor:
    """Rows of positions [0, start - gap) and [start, stop)."""
    after = source.context(sequence, start, stop)
    return torch.cat((source.context(sequence, 0, start - gap), after)) if gap < start else after


def _around(rows: Tensor, sinks: int, low: int, high: int) -> Tensor:
    """The first `sinks` rows and rows [low, high)."""
    if 0 < sinks < low:
        return torch.cat((rows[:sinks], rows[low:high]))
    return rows[0 if sinks else low : high]


def _visible(query_t: Tensor, position_n: Tensor, window: int | None, sinks: int) -> Tensor:
    """bool [t, n]: which keys the queries at some positions see."""
    mask_tn = position_n <= query_t[:, None]
    if window:
        mask_tn &= (position_n > query_t[:, None] - window) | (position_n < sinks)
    return mask_tn


def _selected(chosen_tK: Tensor, position_n: Tensor, stop: int) -> Tensor:
    """bool [t, n]: which of the keys at some positions below `stop` were selected."""
    # One column more, for "none".
    selected_tN = chosen_tK.new_zeros(len(chosen_tK), stop + 1, dtype=torch.bool)
    selected_tN.scatter_(1, torch.where(chosen_tK < 0, stop, chosen_tK).long(), True)
    return selected_tN[:, :stop] if len(position_n) == stop else selected_tN[:, position_n]


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


def _decode(q_SHP: Tensor, keys: KeySource, values: KeySource, scale: float, window: int | None, sinks: int) -> Tensor:
    """One query a sequence: all sequences in one product, padded to the longest context behind a mask."""
    k_SGNP, v_SGNV = keys.padded(), values.padded()
    sequences, groups, longest, _ = k_SGNP.shape
    length_S = torch.tensor(keys.contexts.lengths, device=q_SHP.device)[:, None]
    position_N = torch.arange(longest, device=q_SHP.device)
    mask_SN = position_N < length_S
    if window:
        mask_SN &= (position_N >= length_S - window) | (position_N < sinks)
    q_XQP = q_SHP.unflatten(1, (groups, -1)).flatten(0, 1)
    k_XNP, v_XNV = k_SGNP.flatten(0, 1), v_SGNV.flatten(0, 1)
    mask_X1N = None if mask_SN.all() else mask_SN.repeat_interleave(groups, 0)[:, None]
    out_XQV = softmax_attention(q_XQP, k_XNP, v_XNV, mask_X1N, scale)
    return out_XQV.unflatten(0, (sequences, groups)).flatten(1, 2)
