"""Bringing the partial results of several ranges of keys together (flash-decoding)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu.code import LN2
from foveal.kernels.gpu.launch import Launch, block_size


@triton.jit
def combine_kernel(partial, partial_lse, out, lse, splits, rows, V, BLOCK_V: tl.constexpr):
    """One row of results: its partial results, weighed by their log-sum-exp to base 2."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    most = float("-inf")
    for split in range(splits):
        most = tl.maximum(most, tl.load(partial_lse + split * rows + row))
    finite = tl.where(most == float("-inf"), 0.0, most)
    total = 0.0
    sum_V = tl.zeros([BLOCK_V], tl.float32)
    for split in range(splits):
        weight = tl.exp2(tl.load(partial_lse + split * rows + row) - finite)
        total += weight
        sum_V += weight * tl.load(partial + (split * rows + row) * V + v, mask=v < V, other=0.0)
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    sum_V = sum_V / total
    tl.store(out + row * V + v, sum_V.to(out.dtype.element_ty), mask=v < V)
    tl.store(lse + row, tl.where(nothing, float("-inf"), (finite + tl.log2(total)) * LN2))


def partial_results(splits: int, like_XV: Tensor) -> tuple[Tensor, Tensor]:
    """Room for `splits` float32 results like this one, and their log-sum-exps to base 2."""
    partial = torch.empty(splits, *like_XV.shape, dtype=torch.float32, device=like_XV.device)
    return partial, partial.new_empty(partial.shape[:-1])


def combine(partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """[splits, ..., V] and [splits, ...] into out [..., V] and lse [...] (natural), contiguous."""
    rows, width = lse.numel(), out.shape[-1]
    arguments = {"partial": partial, "partial_lse": partial_lse, "out": out, "lse": lse}
    sizes = {"splits": partial.shape[0], "rows": rows, "V": width}
    return Launch(combine_kernel, (rows,), {**arguments, **sizes}, {"BLOCK_V": block_size(width)}, warps=2)
