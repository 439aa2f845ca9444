"""Attention with sinks (StreamingLLM, arXiv 2309.17453): the first tokens and the latest, for endless sequences."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.kernels.dense import TILE_SCORES, widened
from foveal.kernels.dispatch import operation
from foveal.kernels.flash import flash_forward
from foveal.kernels.keys import KeySource, Queries

# Fewest queries of a tile: shorter ones would spend their time between operations.
_LEAST_TILE = 64


@operation(differentiable=True)
def streaming_attention(
    q_THP: Tensor,
    sink_q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int,
    sinks: int,
) -> Tensor:
    """Causal attention of packed queries over the last `window` keys of their sequences and the first `sinks`.

    q_THP: [T, H, P], queries for the keys of the window; sink_q_THP: the same queries for sinks that the window has
    left behind. keys and values: rows [G, P] and [G, V]; H is a multiple of G.
    With rope, keys are turned by their positions in the sequence, q by its own position t, and sink_q by its position
    in a cache of sinks + window tokens, min(t, sinks + window - 1): sinks then stand right before the window, and
    within the window all distances are the true ones (section 3.2).
    One softmax of scale * q.k over both, in float32. Returns [T, H, V] in q's dtype.
    """
    outputs = []
    for s, (row, count, first) in enumerate(queries):
        k_NGP, v_NGV = (source.context(s, 0, first + count) for source in (keys, values))
        group = q_THP.shape[1] // k_NGP.shape[1]
        k_NHP, v_NHV = k_NGP.repeat_interleave(group, 1), v_NGV.repeat_interleave(group, 1)
        for t in range(count):
            start = max(0, first + t + 1 - window)
            near, far = slice(start, first + t + 1), slice(min(sinks, start))
            near_HN = torch.einsum("hp,nhp->hn", q_THP[row + t], k_NHP[near])
            far_HN = torch.einsum("hp,nhp->hn", sink_q_THP[row + t], k_NHP[far])
            weights_HN = (widened(torch.cat((far_HN, near_HN), 1)) * scale).softmax(-1)
            v_nHV = torch.cat((v_NHV[far], v_NHV[near]))
            outputs.append(torch.einsum("hn,nhv->hv", weights_HN.to(v_nHV), v_nHV))
    return torch.stack(outputs).to(q_THP)


@streaming_attention.add("torch", differentiable=True)
def _streaming_tiled(
    q_THP: Tensor,
    sink_q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int,
    sinks: int,
) -> Tensor:
    """Both kinds of scores side by side, tile by tile."""
    parts = []
    most = max(1, TILE_SCORES // (q_THP.shape[1] * (window + sinks)))
    for s, rows, first, start, stop, far in _tiles(queries, min(most, max(window, _LEAST_TILE)), window, sinks):
        position_t1 = torch.arange(first, stop, device=q_THP.device)[:, None]
        scores_GhtN = torch.cat(
            (
                _far_scores(sink_q_THP[rows], keys.context(s, 0, far), position_t1, window),
                _near_scores(q_THP[rows], keys.context(s, start, stop), position_t1, start, window),
            ),
            -1,
        )
        v_nGV = torch.cat((values.context(s, 0, far), values.context(s, start, stop)))
        parts.append(_weighted((scores_GhtN * scale).softmax(-1), v_nGV).to(q_THP))
    return torch.cat(parts)


@streaming_attention.add("flash", differentiable=False)
def _streaming_merged(
    q_THP: Tensor,
    sink_q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int,
    sinks: int,
) -> Tensor:
    """The window by `flash_forward`, the few sinks by hand; two softmaxes make one by their log-sum-exps."""
    parts = []
    for s, rows, first, start, stop, far in _tiles(queries, max(window, _LEAST_TILE), window, sinks):
        k_nGP, v_nGV = (source.context(s, start, stop) for source in (keys, values))
        inputs = (x[None] for x in (q_THP[rows], k_nGP, v_nGV))
        out_tHV, lse_tH = (x[0] for x in flash_forward(*inputs, causal=True, scale=scale, window=window, sinks=0))
        if far:
            position_t1 = torch.arange(first, stop, device=q_THP.device)[:, None]
            scores_GhtN = _far_scores(sink_q_THP[rows], keys.context(s, 0, far), position_t1, window) * scale
            near_Ght1 = lse_tH.unflatten(1, scores_GhtN.shape[:2]).permute(1, 2, 0)[..., None]
            weights_GhtN = torch.cat((scores_GhtN, near_Ght1), -1).softmax(-1)  # the window as one key more
            share_tH1 = weights_GhtN[..., -1].flatten(0, 1).T[..., None]
            out_tHV = _weighted(weights_GhtN[..., :-1], values.context(s, 0, far)) + share_tH1 * out_tHV
        parts.append(out_tHV.to(q_THP))
    return torch.cat(parts)


class _Tile(NamedTuple):
    """Queries that follow one another, and what they see: the union of their windows, and sinks, which may overlap."""

    sequence: int
    rows: slice
    first: int
    """Position of the first query."""
    start: int
    stop: int
    """Windows lie in positions [start, stop)."""
    far: int
    """Sinks that some window has left behind are in positions [0, far)."""


def _tiles(queries: Queries, most: int, window: int, sinks: int) -> Iterator[_Tile]:
    """All queries, at most so many at once."""
    for s, (row, count, first_of_all) in enumerate(queries):
        for lower in range(0, count, most):
            upper = min(lower + most, count)
            first, stop = first_of_all + lower, first_of_all + upper
            start, far = max(0, first + 1 - window), min(sinks, max(0, stop - window))
            yield _Tile(s, slice(row + lower, row + upper), first, start, stop, far)


def _far_scores(q_tHP: Tensor, k_nGP: Tensor, position_t1: Tensor, window: int) -> Tensor:
    """q.k [G, H / G, t, n] with the first keys; -inf for those inside the window."""
    hidden_tn = torch.arange(len(k_nGP), device=q_tHP.device) > position_t1 - window
    return _scores(q_tHP, k_nGP).masked_fill(hidden_tn, float("-inf"))


def _near_scores(q_tHP: Tensor, k_nGP: Tensor, position_t1: Tensor, start: int, window: int) -> Tensor:
    """q.k [G, H / G, t, n] with keys from position `start` on; -inf for those outside the window."""
    distance_tn = position_t1 - torch.arange(start, start + len(k_nGP), device=q_tHP.device)
    return _scores(q_tHP, k_nGP).masked_fill((distance_tn < 0) | (distance_tn >= window), float("-inf"))


def _scores(q_tHP: Tensor, k_nGP: Tensor) -> Tensor:
    """q.k [G, H / G, t, n], at least float32: the heads of a group are rows of one product."""
    q_GhtP = widened(q_tHP.unflatten(1, (k_nGP.shape[1], -1)).permute(1, 2, 0, 3))
    scores_Gxn = q_GhtP.flatten(1, 2) @ widened(k_nGP.permute(1, 2, 0))
    return scores_Gxn.unflatten(1, q_GhtP.shape[1:3])


def _weighted(weights_GhtN: Tensor, v_nGV: Tensor) -> Tensor:
    """Sums of values [t, H, V], at least float32."""
    sums_GxV = weights_GhtN.flatten(1, 2) @ widened(v_nGV.transpose(0, 1))
    return sums_GxV.unflatten(1, weights_GhtN.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)
