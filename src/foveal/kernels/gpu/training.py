"""The Triton versions of what training needs: the sparse backward, and the indexer's loss, selections included."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.kernels.divergence import index_divergence
from foveal.kernels.gpu.launch import block_size
from foveal.kernels.gpu.library import triton_version
from foveal.kernels.keys import KeySource, Queries
from foveal.kernels.packed import packed_rows, rows_of, sparse_gradients

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tiles of this width fit into the registers and the shared memory of every card.
_MOST_NUMBERS = 576
_MOST_INDEX_NUMBERS = 256
# Over a selection one program has all index heads of a query, and their gradients.
_MOST_INDEX_QUERY = 1 << 13


def _accepts_gradients(
    q_THP: Tensor, k_RGP: Tensor, v_RGV: Tensor, out_THV: Tensor, d_out_THV: Tensor, rows_TK: Tensor, *, scale: float
) -> bool:
    same = all(x.dtype == q_THP.dtype for x in (k_RGP, v_RGV, out_THV, d_out_THV))
    return same and q_THP.dtype in _DTYPES and k_RGP.shape[2] <= _MOST_NUMBERS and v_RGV.shape[2] <= 512


@triton_version(sparse_gradients, _accepts_gradients)
def gradients(
    q_THP: Tensor, k_RGP: Tensor, v_RGV: Tensor, out_THV: Tensor, d_out_THV: Tensor, rows_TK: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_gradients`. Keys' and values' are summed atomically: their last bits vary from run to run."""
    from foveal.kernels.gpu.sparse_backward import sparse_backward

    launch, d_q_THP, d_k_RGP, d_v_RGV = sparse_backward(q_THP, k_RGP, v_RGV, out_THV, d_out_THV, rows_TK, scale=scale)
    launch.run()
    return d_q_THP, d_k_RGP.to(k_RGP.dtype), d_v_RGV.to(v_RGV.dtype)


def _accepts_divergence(
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
) -> bool:
    if keys.contexts.table_SB is not None or index_keys.contexts is not keys.contexts:
        return False
    heads, size = (block_size(count) for count in q_TIJ.shape[1:])
    if selection_TK is not None and heads * size > _MOST_INDEX_QUERY:
        return False
    k_RJ, k_RGP = rows_of(index_keys), rows_of(keys)
    dtypes = k_RJ.dtype == q_TIJ.dtype and k_RGP.dtype == q_THP.dtype
    known = q_TIJ.dtype in _DTYPES and q_THP.dtype in _DTYPES
    return dtypes and known and scale > 0 and q_TIJ.shape[2] <= _MOST_INDEX_NUMBERS


@triton_version(index_divergence, _accepts_divergence, differentiable=True)
def divergence(
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
    """`index_divergence`. Index keys' gradients are summed atomically: their last bits vary. Without a selection tokens
    of weight 0 cost as much as others."""
    from foveal.kernels.gpu.places import places
    from foveal.kernels.gpu.sparse_divergence import selected_divergence
    from foveal.kernels.gpu.warmup import Gaze, warmup_divergence

    where = places(queries, keys.contexts, len(q_TIJ), q_TIJ.device)
    gaze = Gaze(q_THP.detach(), rows_of(keys).detach(), scale)
    if selection_TK is None:
        longest = max(queries.lengths, default=0)
        plan = partial(warmup_divergence, gaze=gaze, token_weights_T=token_weights_T, where=where, longest=longest)
    else:
        rows_TK = packed_rows(selection_TK, keys, queries)
        plan = partial(selected_divergence, gaze=gaze, token_weights_T=token_weights_T, rows_TK=rows_TK)
    result: Any = _Divergence.apply(q_TIJ, weights_TI, rows_of(index_keys), token_weights_T, plan)
    loss, divergence_T = result
    return loss, divergence_T


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the loss; backward only scales it. plan: from what learns to a `Divergence`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TIJ: Tensor,
        weights_TI: Tensor,
        k_RJ: Tensor,
        token_weights_T: Tensor,
        plan: Any,
    ) -> tuple[Tensor, Tensor]:
        result = plan(q_TIJ, weights_TI, k_RJ).run()
        gradients = (result.d_q_TIJ, result.d_weights_TI, result.d_k_RJ)
        learned = (q_TIJ, weights_TI, k_RJ)
        ctx.save_for_backward(*(d.to(x.dtype) for d, x in zip(gradients, learned, strict=True)))
        divergence_T = result.divergence_T.masked_fill(token_weights_T == 0, 0.0)
        ctx.mark_non_differentiable(divergence_T)
        return (divergence_T * token_weights_T).sum(), divergence_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*((gradient * d_loss).to(gradient.dtype) for gradient in ctx.saved_tensors), None, None)
