"""Differentiable exchanges between processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def exchange(rows_XD: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first sent[0] rows to rank 0 of the group, the next sent[1] to rank 1, ...; [sum(received), ...], the
    rows that came from rank 0 first. Differentiable: gradients travel back the same way."""
    result = _Exchange.apply(rows_XD, list(sent), list(received), group)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_XD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(rows_XD, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_YD: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(d_rows_YD, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """`exchange`, without gradients."""
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


def gather_rows(rows_TX: Tensor, place_N: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
    """[N, ...]: rows of all ranks of the group, each of which has at most `most`. place_N: int64, number
    rank * most + row of each. Differentiable: what all ranks' results tell a row is added up."""
    result = _GatherRows.apply(rows_TX, place_N, most, group)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TX: Tensor, place_N: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(place_N)
        ctx.count, ctx.most, ctx.group = len(rows_TX), most, group
        padded = rows_TX.new_zeros(most, *rows_TX.shape[1:])
        padded[: len(rows_TX)] = rows_TX
        everything = rows_TX.new_empty(group.size() * most, *rows_TX.shape[1:])
        dist.all_gather_single(everything, padded, group=group)
        return everything[place_N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_NX: Tensor) -> tuple[Tensor | None, ...]:
        (place_N,) = ctx.saved_tensors
        everything = d_rows_NX.new_zeros(ctx.group.size() * ctx.most, *d_rows_NX.shape[1:])
        everything[place_N] = d_rows_NX
        d_rows_TX = d_rows_NX.new_empty(ctx.most, *d_rows_NX.shape[1:])
        dist.reduce_scatter_single(d_rows_TX, everything, group=ctx.group)
        return d_rows_TX[: ctx.count], None, None, None
