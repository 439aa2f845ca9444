"""The lightning indexer's scores, and the exact top-k of them."""

import torch
from torch import Tensor

from foveal.kernels.dispatch import operation
from foveal.kernels.keys import KeySource, Queries
from foveal.kernels.quantise import to_float32

# Scores of one tile (queries x index heads x keys), and keys of one stretch of context.
TILE_SCORES = 1 << 21
STRETCH = 8192


@operation(differentiable=False)
def select(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> Tensor:
    """For each query the positions of the `topk` earlier tokens (itself included) with the highest index scores.

    I(t, n) = sum_i weights(t, i) ReLU(q(t, i) . k(n)) in float32 (DeepSeek-V3.2 report, equation 1; the softmax scale,
    the head scale and the query's quantisation scale are folded into the weights, a key's scale into the key).
    q_TIJ: [T, I, J], any float dtype, e4m3 or int8; weights_TI: float32 [T, I]; keys: rows [J]. Returns int32
    [T, topk], ascending, -1 last where a query has fewer earlier tokens. Ties go to the lower position.
    """
    selection_TK = torch.full((q_TIJ.shape[0], topk), -1, dtype=torch.int32, device=q_TIJ.device)
    for s, (row, count, first) in enumerate(queries):
        k_NJ = keys.context(s, 0, first + count).float()
        for t in range(count):
            products_IN = torch.relu(to_float32(q_TIJ[row + t]) @ k_NJ[: first + t + 1].T)
            order = (weights_TI[row + t] @ products_IN).argsort(descending=True, stable=True)[:topk]
            selection_TK[row + t, : len(order)] = order.sort().values
    return selection_TK


@select.add("torch", differentiable=False)
def _select_streamed(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> Tensor:
    selection_TK = torch.empty(q_TIJ.shape[0], topk, dtype=torch.int32, device=q_TIJ.device)
    for s, (row, count, first) in enumerate(queries):
        rows = slice(row, row + count)
        _select_sequence(to_float32(q_TIJ[rows]), weights_TI[rows], keys, s, first, selection_TK[rows])
    return selection_TK


def _select_sequence(
    q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, sequence: int, position: int, selection_TK: Tensor
) -> None:
    """Fill the selection of one sequence's queries, the first at `position`: a running top-k over stretches of context,
    each read once for all queries."""
    count, stop = q_TIJ.shape[0], position + q_TIJ.shape[0]
    best_TK = torch.empty(selection_TK.shape, device=q_TIJ.device) if stop > STRETCH else None
    for start in range(0, stop, STRETCH):
        k_NJ = keys.context(sequence, start, min(start + STRETCH, stop)).float()
        tile = max(1, TILE_SCORES // (q_TIJ.shape[1] * k_NJ.shape[0]))
        # Queries before this stretch see nothing of it.
        for lower in range(max(0, start - position), count, tile):
            rows = slice(lower, min(lower + tile, count))
            visible = position + rows.stop - start
            scores_tN = index_scores(q_TIJ[rows], weights_TI[rows], k_NJ[:visible])
            if start + scores_tN.shape[1] > position + lower + 1:
                hide_future(scores_tN, start, position + lower)
            keep_highest(scores_tN, start, selection_TK[rows], None if best_TK is None else best_TK[rows])


def hide_future(scores_TN: Tensor, start: int, position: int) -> None:
    """-inf for keys (the first at `start`) behind the queries (the first at `position`)."""
    count, width = scores_TN.shape
    key_N = torch.arange(start, start + width, device=scores_TN.device)
    query_T1 = torch.arange(position, position + count, device=scores_TN.device)[:, None]
    scores_TN.masked_fill_(key_N > query_T1, float("-inf"))


def keep_highest(scores_TN: Tensor, start: int, selection_TK: Tensor, best_TK: Tensor | None) -> None:
    """Bring the running top-k up to date with the scores of the stretch that begins at `start`.

    selection_TK: positions kept so far, overwritten; best_TK: their scores, -inf where there is none (None: this is the
    only stretch). Both mean nothing yet where start is 0.
    """
    topk = selection_TK.shape[1]
    if start == 0:
        place_TK = first_of_the_highest(scores_TN, topk)
        selection_TK.copy_(place_TK)
    else:
        assert best_TK is not None
        # What was kept stands before the new stretch, so lower places still mean lower positions.
        scores_TN = torch.cat((best_TK, scores_TN), 1)
        place_TK = first_of_the_highest(scores_TN, topk)
        kept_TK = selection_TK.gather(1, place_TK.clamp(0, topk - 1).long())
        new_TK = place_TK + (start - topk)
        selection_TK.copy_(torch.where(place_TK < 0, -1, torch.where(place_TK < topk, kept_TK, new_TK)))
    if best_TK is not None:
        best_TK.copy_(scores_TN.gather(1, place_TK.clamp_min(0).long()).masked_fill_(place_TK < 0, float("-inf")))


def index_scores(q_tIJ: Tensor, weights_tI: Tensor, k_NJ: Tensor) -> Tensor:
    """sum_i weights(t, i) ReLU(q(t, i) . k(n)): float32 [t, n] of q [t, I, J] (any dtype), float32 weights [t, I] and
    k [n, J]."""
    count, heads, _ = q_tIJ.shape
    products_tIN = (to_float32(q_tIJ).flatten(0, 1) @ to_float32(k_NJ).T).relu_().unflatten(0, (count, heads))
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
