"""How far the indexer's scores are from what attention looks at: the loss that teaches an indexer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.kernels.dense import widened
from foveal.kernels.dispatch import operation
from foveal.kernels.keys import KeySource, Queries
from foveal.kernels.packed import gather_tiles, packed_rows, rows_of

# Scores of one tile: queries x heads (attention's or the indexer's, whichever are more) x keys.
TILE_SCORES = 1 << 21


@operation(differentiable=True)
def index_divergence(
    q_TIJ: Tensor,
    weights_TI: Tensor,
    index_keys: KeySource,
    q_THP: Tensor,
    keys: KeySource,
    queries: Queries,
    token_weights_T: Tensor,
    *,
    scale: float,
    selection_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of token_weights * KL(p || softmax(I)): p is where attention looks, I the index scores
    (DeepSeek-V3.2 report, section 2.1, equations 3 and 4).

    p: the softmax of scale * q.k (q_THP: [T, H, P]; keys: rows [G, P]), averaged over heads, which is their sum,
    L1-normalised. I(t, n) = sum_i weights(t, i) ReLU(q(t, i) . k(n)) (q_TIJ: [T, I, J]; weights_TI: [T, I]; index keys:
    rows [J]). Both over all keys up to the query's own, or with `selection_TK` (int32 [T, K], -1 = none) over these.
    Rows are packed (no pages). token_weights_T: [T].
    Returns the sum, a scalar, differentiable in q_TIJ, weights_TI and the index keys alone, and every token's KL,
    [T], without gradient; both at least float32. A token whose selection is empty has 0.
    """
    divergences = []
    for s, (row, count, first) in enumerate(queries):
        k_NGP, k_NJ = (widened(source.context(s, 0, first + count)) for source in (keys, index_keys))
        k_NHP = k_NGP.repeat_interleave(q_THP.shape[1] // k_NGP.shape[1], 1)
        for t in range(count):
            seen_N = torch.arange(first + t + 1, device=q_TIJ.device)
            if selection_TK is not None:
                seen_N = selection_TK[row + t][selection_TK[row + t] >= 0].long()
            with torch.no_grad():
                logits_HN = torch.einsum("hp,nhp->hn", widened(q_THP[row + t]), k_NHP[seen_N]) * scale
                p_N = logits_HN.softmax(-1).mean(0)
            scores_N = weights_TI[row + t] @ torch.relu(widened(q_TIJ[row + t]) @ k_NJ[seen_N].T)
            divergences.append((torch.special.xlogy(p_N, p_N) - p_N * scores_N.log_softmax(-1)).sum())
    divergence_T = torch.stack(divergences)
    return (divergence_T * token_weights_T).sum(), divergence_T.detach()


@dataclass(frozen=True)
class _Target:
    """Where attention looks, tile by tile."""

    q_THP: Tensor
    k_RGP: Tensor
    starts: tuple[int, ...]
    """First packed row of each sequence."""
    queries: Queries
    scale: float
    rows_TK: Tensor | None
    """Packed rows of the selection, -1 = none; None: everything up to the query is seen."""

    def tiles(self, heads: int, width: int) -> Iterator[tuple[slice, Tensor | slice, Tensor]]:
        """(queries, packed rows that they see, bool: which of these they do not): rows are a slice that all share, or
        int64 [t, K]. `heads` and `width` say how large an indexer's scores and a row of its keys are."""
        if self.rows_TK is not None:
            yield from gather_tiles(self.rows_TK, self.k_RGP[0].numel() + width)
            return
        for s, rows, first in context_tiles(self.queries, max(heads, self.q_THP.shape[1])):
            stop = first + rows.stop - rows.start
            hidden_tN = future(first, stop - first, stop, self.q_THP.device)
            yield rows, slice(self.starts[s], self.starts[s] + stop), hidden_tN


@index_divergence.add("tiled", differentiable=True)
def _index_divergence_tiled(
    q_TIJ: Tensor,
    weights_TI: Tensor,
    index_keys: KeySource,
    q_THP: Tensor,
    keys: KeySource,
    queries: Queries,
    token_weights_T: Tensor,
    *,
    scale: float,
    selection_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets and scores live for one tile; a tile's gradient is known as soon as both are, so there is one pass."""
    rows_TK = None if selection_TK is None else packed_rows(selection_TK, keys, queries)
    starts = keys.contexts.starts
    target = _Target(q_THP.detach(), rows_of(keys).detach(), starts, queries, scale, rows_TK)
    result: Any = _Divergence.apply(q_TIJ, weights_TI, rows_of(index_keys), token_weights_T, target)  # type: ignore[no-untyped-call]
    loss, divergence_T = result
    return loss, divergence_T


class _Divergence(torch.autograd.Function):
    """The gradient of each tile is computed on the way, with the token weights; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, q_TIJ: Tensor, weights_TI: Tensor, k_RJ: Tensor, token_weights_T: Tensor, target: _Target
    ) -> tuple[Tensor, Tensor]:
        learned = (q_TIJ, weights_TI, k_RJ)
        widest = max((widened(x).dtype for x in learned), key=lambda dtype: dtype.itemsize)
        q_TIJ, weights_TI, k_RJ = (x.to(widest) for x in learned)
        d_q_TIJ, d_weights_TI, d_k_RJ = (torch.zeros_like(x) for x in (q_TIJ, weights_TI, k_RJ))
        divergence_T = weights_TI.new_zeros(len(q_TIJ))
        for rows, places, hidden_tN in target.tiles(*q_TIJ.shape[1:]):
            k_NJ, q_tIJ, weights_tI = k_RJ[places], q_TIJ[rows], weights_TI[rows]
            p_tN = attention_shares(target.q_THP[rows], target.k_RGP[places], target.scale, hidden_tN).to(widest)
            products_tIN = (q_tIJ @ k_NJ.mT).relu_()
            scores_tN = (weights_tI[:, None] @ products_tIN)[:, 0]
            divergence_T[rows], d_scores_tN = _compare(p_tN, scores_tN, hidden_tN, token_weights_T[rows])
            d_weights_TI[rows] = (products_tIN @ d_scores_tN[..., None])[..., 0]
            d_products_tIN = (products_tIN > 0) * weights_tI[..., None] * d_scores_tN[:, None]
            d_q_TIJ[rows] = d_products_tIN @ k_NJ
            if isinstance(places, slice):
                d_k_RJ[places] += d_products_tIN.flatten(0, 1).T @ q_tIJ.flatten(0, 1)
            else:
                d_k_RJ.index_add_(0, places.flatten(), (d_products_tIN.mT @ q_tIJ).flatten(0, 1))
        gradients = (d_q_TIJ, d_weights_TI, d_k_RJ)
        ctx.save_for_backward(*(d.to(x.dtype) for d, x in zip(gradients, learned, strict=True)))
        ctx.mark_non_differentiable(divergence_T)
        return (divergence_T * token_weights_T).sum(), divergence_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*((gradient * d_loss).to(gradient.dtype) for gradient in ctx.saved_tensors), None, None)


def attention_shares(q_tHP: Tensor, k_NGP: Tensor, scale: float, hidden_tN: Tensor) -> Tensor:
    """Where a few queries look: softmax(scale * q.k) averaged over heads, [t, N], at least float32.

    q_tHP: [t, H, P]; k_NGP: keys that all share, [N, G, P], or each query's own, [t, N, G, P]; hidden_tN: bool, True =
    not seen. A query that sees nothing has NaN.
    """
    count, groups = len(q_tHP), k_NGP.shape[-2]
    q_tGhP = widened(q_tHP).unflatten(1, (groups, -1))
    if k_NGP.dim() == 4:
        logits_GhtN = (q_tGhP @ widened(k_NGP).permute(0, 2, 3, 1)).permute(1, 2, 0, 3)
    else:
        q_GXP = q_tGhP.permute(1, 2, 0, 3).flatten(1, 2)
        logits_GhtN = (q_GXP @ widened(k_NGP).permute(1, 2, 0)).unflatten(1, (-1, count))
    return (logits_GhtN * scale).masked_fill_(hidden_tN, float("-inf")).softmax(-1).mean((0, 1))


def future(first: int, count: int, keys: int, device: torch.device) -> Tensor:
    """bool [count, keys]: which keys stand behind queries at positions first, first + 1, ..."""
    position_t1 = torch.arange(first, first + count, device=device)[:, None]
    return torch.arange(keys, device=device) > position_t1


def context_tiles(queries: Queries, heads: int) -> Iterator[tuple[int, slice, int]]:
    """(sequence, packed rows of a few queries, position of the first), so few that all their scores stay small."""
    for s, (row, count, first) in enumerate(queries):
        tile = max(1, TILE_SCORES // (heads * max(1, first + count)))
        for lower in range(0, count, tile):
            yield s, slice(row + lower, row + min(lower + tile, count)), first + lower


def _compare(p_tN: Tensor, scores_tN: Tensor, hidden_tN: Tensor, token_weights_t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(scores)), [t], and the gradient of its weighted sum by the scores: (softmax(scores) - p) a token.

    What is hidden, and a token that sees nothing, has no part in either.
    """
    log_tN = scores_tN.masked_fill(hidden_tN, float("-inf")).log_softmax(-1).masked_fill_(hidden_tN, 0.0)
    p_tN = p_tN.masked_fill(hidden_tN, 0.0)
    divergence_t = (torch.special.xlogy(p_tN, p_tN) - p_tN * log_tN).sum(-1)
    d_scores_tN = (log_tN.exp() - p_tN).masked_fill_(hidden_tN, 0.0) * token_weights_t[:, None]
    return divergence_t, d_scores_tN
