"""The lightning indexer's scores, and the exact top-k of them."""

import torch
from torch import Tensor

from foveal.kernels.dispatch import operation
from foveal.kernels.keys import KeySource, Queries

# Scores of one tile (queries x index heads x keys), and keys of one stretch of context.
TILE_SCORES = 1 << 21
STRETCH = 8192


@operation(differentiable=False)
def select(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> Tensor:
    """For each query the positions of the `topk` earlier tokens (itself included) with the highest index scores.

    I(t, n) = sum_i weights(t, i) ReLU(q(t, i) . k(n)) in float32 (DeepSeek-V3.2 report, equation 1; the softmax scale,
    the head scale and the query's quantisation scale are folded into the weights, a key's scale into the key).
    q_TIJ: [T, I, J]; weights_TI: float32 [T, I]; keys: rows [J]. Returns int32 [T, topk], ascending, -1 last where a
    query has fewer earlier tokens. Ties go to the lower position.
    """
    selection_TK = torch.full((q_TIJ.shape[0], topk), -1, dtype=torch.int32, device=q_TIJ.device)
    for s, (row, count, first) in enumerate(queries):
        k_NJ = keys.context(s, 0, first + count).float()
        for t in range(count):
            products_IN = torch.relu(q_TIJ[row + t].float() @ k_NJ[: first + t + 1].T)
            order = (weights_TI[row + t] @ products_IN).argsort(descending=True, stable=True)[:topk]
            selection_TK[row + t, : len(order)] = order.sort().values
    return selection_TK


@select.add("torch", differentiable=False)
def _select_streamed(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> Tensor:
    parts = []
    for s, (row, count, first) in enumerate(queries):
        tile = max(1, TILE_SCORES // (q_TIJ.shape[1] * min(first + count, STRETCH)))
        for lower in range(0, count, tile):
            rows = slice(row + lower, row + min(lower + tile, count))
            parts.append(_select_tile(q_TIJ[rows].float(), weights_TI[rows], keys, s, first + lower, topk))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _select_tile(q_tIJ: Tensor, weights_tI: Tensor, keys: KeySource, sequence: int, position: int, topk: int) -> Tensor:
    """The selection of neighbouring queries, the first at `position`: a running top-k over stretches of context."""
    count, stop = q_tIJ.shape[0], position + q_tIJ.shape[0]
    best_scores_tK: Tensor | None = None
    best_tK: Tensor | None = None
    for start in range(0, stop, STRETCH):
        end = min(start + STRETCH, stop)
        scores_tN = _scores(q_tIJ, weights_tI, keys.context(sequence, start, end).float())
        if end > position + 1:
            key_N = torch.arange(start, end, device=q_tIJ.device)
            query_t = torch.arange(position, stop, device=q_tIJ.device)[:, None]
            scores_tN.masked_fill_(key_N > query_t, float("-inf"))
        if best_scores_tK is None or best_tK is None:
            place_tK = first_of_the_highest(scores_tN, topk)
            best_tK = place_tK
        else:
            # What was kept stands before the new stretch, so lower places still mean lower positions.
            scores_tN = torch.cat((best_scores_tK, scores_tN), 1)
            place_tK = first_of_the_highest(scores_tN, topk)
            width = best_scores_tK.shape[1]
            kept_tK = best_tK.gather(1, place_tK.clamp(0, width - 1).long())
            best_tK = torch.where(place_tK < width, torch.where(place_tK < 0, -1, kept_tK), place_tK + (start - width))
        if end < stop:
            kept_tK = scores_tN.gather(1, place_tK.clamp_min(0).long())
            best_scores_tK = kept_tK.masked_fill_(place_tK < 0, float("-inf"))
    assert best_tK is not None and best_tK.shape == (count, topk)
    return best_tK


def _scores(q_tIJ: Tensor, weights_tI: Tensor, k_NJ: Tensor) -> Tensor:
    """float32 [t, n]."""
    count, heads, _ = q_tIJ.shape
    products_tIN = (q_tIJ.flatten(0, 1) @ k_NJ.T).relu_().unflatten(0, (count, heads))
    return torch.bmm(weights_tI[:, None], products_tIN)[:, 0]


def first_of_the_highest(scores_TN: Tensor, topk: int) -> Tensor:
    """Places of each row's `topk` highest scores, ascending, -1 last; -inf is never chosen, ties go to the lower place.

    int32 [T, topk]. `torch.topk` leaves the choice among ties open, so it only finds the lowest score that is kept.
    """
    count, width = scores_TN.shape
    kept_TN = scores_TN > float("-inf")
    if width > topk:
        lowest_T1 = scores_TN.topk(topk, sorted=False).values.amin(1, keepdim=True)
        highest_TN = scores_TN >= lowest_T1
        if int(highest_TN.sum()) == count * topk:  # no ties at the edge, and so no -inf either
            return highest_TN.nonzero()[:, 1].view(count, topk).int()
        above_TN = scores_TN > lowest_T1
        tied_TN = highest_TN & ~above_TN
        room_T1 = topk - above_TN.sum(1, keepdim=True)
        kept_TN &= above_TN | (tied_TN & (tied_TN.cumsum(1, dtype=torch.int32) <= room_T1))
    row_X, place_X = kept_TN.nonzero(as_tuple=True)
    kept_T = kept_TN.sum(1)
    rank_X = torch.arange(len(row_X), device=row_X.device) - (kept_T.cumsum(0) - kept_T)[row_X]
    places_TK = torch.full((count, topk), -1, dtype=torch.int32, device=scores_TN.device)
    places_TK[row_X, rank_X] = place_X.int()
    return places_TK
