"""Attention over a batch's own rows, for training: memory is linear in the context, backward pass included."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from foveal.kernels.dense import attention, widened
from foveal.kernels.dispatch import operation
from foveal.kernels.flash import flash_attention
from foveal.kernels.keys import KeySource, Queries
from foveal.kernels.sparse import check_selection, gathered_queries, sparse_attention
from foveal.kernels.transfer import upload

# The widest heads that torch's FlashAttention takes on a GPU.
FLASH_WIDTH = 256


def rows_of(source: KeySource) -> Tensor:
    """All rows that packed sequences may name, from the first one on, as one differentiable tensor."""
    contexts = source.contexts
    assert contexts.table_SB is None
    stop = max(start + length for start, length in zip(contexts.starts, contexts.lengths, strict=True))
    return source.records.read(slice(0, stop))


def learns(q_THP: Tensor, keys: KeySource, values: KeySource) -> bool:
    """Whether gradients are wanted, of packed rows."""
    if not torch.is_grad_enabled() or keys.contexts.table_SB is not None:
        return False
    return any(x.requires_grad for x in (q_THP, rows_of(keys), rows_of(values)))


def _accepts_dense(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    selection_TK: Tensor | None = None,
) -> bool:
    return selection_TK is None and learns(q_THP, keys, values)


@attention.add("recomputed", differentiable=True, accepts=_accepts_dense)
def _attention_recomputed(
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
    """Sequence by sequence; no weights are kept for the backward pass."""
    parts = []
    for s, (row, count, first) in enumerate(queries):
        q_tHP = q_THP[row : row + count]
        k_NGP, v_NGV = (source.context(s, 0, first + count) for source in (keys, values))
        if first == 0 and window is None:
            parts.append(_whole(q_tHP, k_NGP, v_NGV, scale))
        else:
            q, k, v = q_tHP[None], k_NGP[None], v_NGV[None]
            parts.append(flash_attention(q, k, v, causal=True, scale=scale, window=window, sinks=sinks)[0])
    return torch.cat(parts)


def _whole(q_NHP: Tensor, k_NGP: Tensor, v_NGV: Tensor, scale: float) -> Tensor:
    """A sequence that is all queries, by torch's fused attention."""
    q, k, v = (x.transpose(0, 1)[None] for x in _as_fused(q_NHP, k_NGP, v_NGV, gpu=q_NHP.is_cuda))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)[..., : v_NGV.shape[-1]]


def _as_fused(q_NHP: Tensor, k_NGP: Tensor, v_NGV: Tensor, *, gpu: bool) -> tuple[Tensor, ...]:
    """As torch's fused kernels want them: values as wide as keys; on a GPU widths in eights, and groups of heads for
    FlashAttention alone. For anything else torch would quietly keep the scores of all pairs."""
    width = max(k_NGP.shape[-1], v_NGV.shape[-1])
    if gpu:
        width = -(-width // 8) * 8
        if q_NHP.dtype not in (torch.bfloat16, torch.float16) or width > FLASH_WIDTH:
            k_NGP, v_NGV = (x.repeat_interleave(q_NHP.shape[1] // x.shape[1], 1) for x in (k_NGP, v_NGV))
    return tuple(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q_NHP, k_NGP, v_NGV))


def _accepts_sparse(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> bool:
    return learns(q_THP, keys, values)


@sparse_attention.add("recomputed", differentiable=True, accepts=_accepts_sparse)
def _sparse_recomputed(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> Tensor:
    check_selection(selection_TK, keys, queries)

    def forward(q_THP: Tensor) -> Tensor:
        return sparse_attention(q_THP, keys, values, selection_TK, queries, scale=scale)

    rows_TK = packed_rows(selection_TK, keys, queries)
    result = _SparseAttention.apply(q_THP, rows_of(keys), rows_of(values), rows_TK, scale, forward)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


def packed_rows(selection_TK: Tensor, keys: KeySource, queries: Queries) -> Tensor:
    """int64 [T, K]: the packed rows of selected positions; -1 stays."""
    device = selection_TK.device
    start_T = upload(keys.contexts.starts, device).index_select(0, queries.sequence_on(device))
    return torch.where(selection_TK < 0, -1, selection_TK + start_T[:, None])


def gather_tiles(rows_TK: Tensor, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(queries, their rows with -1 as 0, where they were -1), a tile of queries at a time (see `gathered_queries`)."""
    tile = gathered_queries(rows_TK, width)
    for lower in range(0, len(rows_TK), tile):
        rows_tK = rows_TK[lower : lower + tile]
        yield slice(lower, lower + len(rows_tK)), rows_tK.clamp_min(0), rows_tK < 0


class _SparseAttention(torch.autograd.Function):
    """Any version's forward pass; a backward pass that gathers again, and adds each query's part to its rows."""

    @staticmethod
    def forward(
        ctx: Any, q_THP: Tensor, k_RGP: Tensor, v_RGV: Tensor, rows_TK: Tensor, scale: float, forward: Any
    ) -> Tensor:
        out_THV: Tensor = forward(q_THP.detach())
        ctx.save_for_backward(q_THP, k_RGP, v_RGV, out_THV, rows_TK)
        ctx.scale = scale
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THV: Tensor) -> tuple[Tensor | None, ...]:
        q_THP, k_RGP, v_RGV, out_THV, rows_TK = ctx.saved_tensors
        gradients = sparse_gradients(q_THP, k_RGP, v_RGV, out_THV, d_out_THV, rows_TK, scale=ctx.scale)
        return (*gradients, None, None, None)


@operation(differentiable=False)
def sparse_gradients(
    q_THP: Tensor, k_RGP: Tensor, v_RGV: Tensor, out_THV: Tensor, d_out_THV: Tensor, rows_TK: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, keys and values of attention over selected packed rows, from those of its result.

    q_THP: [T, H, P]; k_RGP and v_RGV: rows [G, P] and [G, V]; out_THV and d_out_THV: the result and its gradient;
    rows_TK: int64, -1 = none. Each in its tensor's dtype. Rows that nothing selects have 0.
    """
    groups, row_numbers = k_RGP.shape[1], k_RGP[0].numel() + v_RGV[0].numel()
    d_q_THP = torch.empty_like(q_THP)
    d_k_RX, d_v_RX = (widened(x.new_zeros(x.shape)).flatten(1) for x in (k_RGP, v_RGV))
    for rows, rows_tK, missing_tK in gather_tiles(rows_TK, row_numbers):
        k_tGKP, v_tGKV = (widened(x[rows_tK].transpose(1, 2)) for x in (k_RGP, v_RGV))
        q_tGhP, d_out_tGhV, out_tGhV = (
            widened(x[rows].unflatten(1, (groups, -1))) for x in (q_THP, d_out_THV, out_THV)
        )
        scores_tGhK = q_tGhP @ k_tGKP.mT * scale
        # A query that sees nothing has weights 0 (its softmax would be NaN).
        scores_tGhK = scores_tGhK.masked_fill(missing_tK[:, None, None], float("-inf"))
        weights_tGhK = scores_tGhK.softmax(-1).masked_fill(missing_tK[:, None, None], 0.0)
        share_tGh1 = (d_out_tGhV * out_tGhV).sum(-1, keepdim=True)
        d_scores_tGhK = weights_tGhK * (d_out_tGhV @ v_tGKV.mT - share_tGh1) * scale
        d_q_THP[rows] = (d_scores_tGhK @ k_tGKP).flatten(1, 2).to(q_THP.dtype)
        rows_X = rows_tK.flatten()
        d_k_RX.index_add_(0, rows_X, (d_scores_tGhK.mT @ q_tGhP).transpose(1, 2).flatten(2).flatten(0, 1))
        d_v_RX.index_add_(0, rows_X, (weights_tGhK.mT @ d_out_tGhV).transpose(1, 2).flatten(2).flatten(0, 1))
    d_k_RGP, d_v_RGV = (d.view(x.shape).to(x.dtype) for d, x in ((d_k_RX, k_RGP), (d_v_RX, v_RGV)))
    return d_q_THP, d_k_RGP, d_v_RGV
