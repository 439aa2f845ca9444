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
from foveal.kernels.transfer import send

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
    Rows are packed (no pages). token_weights_T: [T]; a token of weight 0 is not looked at.
    Returns the sum, a scalar, differentiable in q_TIJ, weights_TI and the index keys alone, and every token's KL,
    [T], without gradient; both at least float32. A token whose selection is empty, or whose weight is 0, has 0.
    """
    divergences = []
    for s, (row, count, first) in enumerate(queries):
        k_NGP, k_NJ = (widened(source.context(s, 0, first + count)) for source in (keys, index_keys))
        k_NHP = k_NGP.repeat_interleave(q_THP.shape[1] // k_NGP.shape[1], 1)
        for t in range(count):
            if not token_weights_T[row + t]:
                divergences.append(weights_TI.new_zeros((), dtype=k_NJ.dtype))
                continue
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

    def tiles(self, asked_A: Tensor, heads: int, width: int) -> Iterator[tuple[Tensor, Tensor | slice, Tensor]]:
        """(queries, packed rows that they see, bool: which of these they do not): rows are a slice that all share, or
        int64 [t, K]. asked_A: the queries that count, ascending, on the CPU; `heads` and `width` say how large an
        indexer's scores and a row of its keys are."""
        device = self.q_THP.device
        if self.rows_TK is not None:
            rows_A = send(asked_A, device)
            for part, rows_tK, missing_tK in gather_tiles(self.rows_TK[rows_A], self.k_RGP[0].numel() + width):
                yield rows_A[part], rows_tK, missing_tK
            return
        most = TILE_SCORES // max(heads, self.q_THP.shape[1])
        for s, (row, count, first) in enumerate(self.queries):
            own_t = asked_A[(asked_A >= row) & (asked_A < row + count)]
            for asked_t in own_t.split(max(1, most // (first + count))) if len(own_t) else ():
                seen = int(asked_t[-1]) + first - row + 1
                rows_t = send(asked_t, device)
                hidden_tN = torch.arange(seen, device=device) > rows_t[:, None] + (first - row)
                yield rows_t, slice(self.starts[s], self.starts[s] + seen), hidden_tN


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
    """Targets and scores live for one tile; a tile's gradient is known as soon as both are, so there is one pass.

    ReLU(q.k) is q.(gate k), gate = [q.k > 0]: with G = sum_n d_score(n) gate(n) k(n), the gradient of a head's weight
    is q.G, and that of its query is weight * G.
    """
    rows_TK = None if selection_TK is None else packed_rows(selection_TK, keys, queries)
    starts = keys.contexts.starts
    # Widened once: each key meets every later tile.
    k_RGP = widened(rows_of(keys).detach())
    target = _Target(q_THP.detach(), k_RGP, starts, queries, scale, rows_TK)
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
        for rows_t, places, hidden_tN in target.tiles(_asked(token_weights_T), *q_TIJ.shape[1:]):
            k_NJ, q_tIJ, weights_tI = k_RJ[places], q_TIJ[rows_t], weights_TI[rows_t]
            p_tN = attention_shares(target.q_THP[rows_t], target.k_RGP[places], target.scale, hidden_tN).to(widest)
            products_tIN = (q_tIJ @ k_NJ.mT).relu_()
            scores_tN = _weighed(weights_tI, products_tIN)
            divergence_T[rows_t], d_scores_tN = _compare(p_tN, scores_tN, hidden_tN, token_weights_T[rows_t])
            gated_tIN = products_tIN.sign_().mul_(d_scores_tN[:, None])
            sums_tIJ = gated_tIN @ k_NJ
            d_weights_TI[rows_t] = (q_tIJ * sums_tIJ).sum(-1)
            d_q_TIJ[rows_t] = weights_tI[..., None] * sums_tIJ
            weighed_tIJ = weights_tI[..., None] * q_tIJ
            if isinstance(places, slice):
                d_k_RJ[places] += gated_tIN.flatten(0, 1).T @ weighed_tIJ.flatten(0, 1)
            else:
                d_k_RJ.index_add_(0, places.flatten(), (gated_tIN.mT @ weighed_tIJ).flatten(0, 1))
        gradients = (d_q_TIJ, d_weights_TI, d_k_RJ)
        ctx.save_for_backward(*(d.to(x.dtype) for d, x in zip(gradients, learned, strict=True)))
        divergence_T.masked_fill_(token_weights_T == 0, 0.0)
        ctx.mark_non_differentiable(divergence_T)
        return (divergence_T * token_weights_T).sum(), divergence_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*((gradient * d_loss).to(gradient.dtype) for gradient in ctx.saved_tensors), None, None)


def _asked(token_weights_T: Tensor) -> Tensor:
    """int64, on the CPU: the queries that count. With a GPU all do, for the host would wait to know which."""
    return torch.arange(len(token_weights_T)) if token_weights_T.is_cuda else token_weights_T.nonzero()[:, 0]


def attention_shares(q_tHP: Tensor, k_NGP: Tensor, scale: float, hidden_tN: Tensor) -> Tensor:
    """Where a few queries look: softmax(scale * q.k) averaged over heads, [t, N], at least float32.

    q_tHP: [t, H, P]; k_NGP: keys that all share, [N, G, P], or each query's own, [t, N, G, P]; hidden_tN: bool, True =
    not seen. A query that sees nothing has NaN.
    """
    count, groups = len(q_tHP), k_NGP.shape[-2]
    q_tGhP = (widened(q_tHP) * scale).unflatten(1, (groups, -1))
    if k_NGP.dim() == 4:
        logits_GhtN = (q_tGhP @ widened(k_NGP).permute(0, 2, 3, 1)).permute(1, 2, 0, 3)
    else:
        q_GXP = q_tGhP.permute(1, 2, 0, 3).flatten(1, 2)
        logits_GhtN = (q_GXP @ widened(k_NGP).permute(1, 2, 0)).unflatten(1, (-1, count))
    return logits_GhtN.masked_fill_(hidden_tN, float("-inf")).softmax(-1).mean((0, 1))


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


def _weighed(weights_tI: Tensor, products_tIN: Tensor) -> Tensor:
    """The sum over heads, [t, N]: one row at a time stays in the cache (a batched product of single rows does not)."""
    scores_tN = weights_tI[:, :1] * products_tIN[:, 0]
    for i in range(1, weights_tI.shape[1]):
        scores_tN.addcmul_(weights_tI[:, i : i + 1], products_tIN[:, i])
    return scores_tN


def _compare(p_tN: Tensor, scores_tN: Tensor, hidden_tN: Tensor, token_weights_t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(scores)), [t], and the gradient of its weighted sum by the scores: (softmax(scores) - p) a token.

    What is hidden, and a token that sees nothing, has no part in either.
    """
    log_tN = scores_tN.masked_fill(hidden_tN, float("-inf")).log_softmax(-1).masked_fill_(hidden_tN, 0.0)
    p_tN = p_tN.masked_fill(hidden_tN, 0.0)
    divergence_t = (torch.special.xlogy(p_tN, p_tN) - p_tN * log_tN).sum(-1)
    d_scores_tN = (log_tN.exp() - p_tN).masked_fill_(hidden_tN, 0.0) * token_weights_t[:, None]
    return divergence_t, d_scores_tN
