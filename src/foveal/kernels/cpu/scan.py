"""Selective scans (csrc/kernels/scan.cpp): Mamba-1's, with gradients (scan_gradient.cpp), and Mamba-2's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.kernels.cpu.library import Kernels, address, compiled
from foveal.kernels.cpu.tokens import all_float32, by_token, check_groups, check_shapes, rows, span_arguments
from foveal.kernels.keys import Queries
from foveal.kernels.scan import selective_scan
from foveal.kernels.ssd import ssd

# Tokens between states that are kept for the backward pass, and channels that it takes through them together.
CHUNK, BLOCK = 32, 64


def _accepts(
    u_TX: Tensor, dt_TX: Tensor, a_XY: Tensor, b_TY: Tensor, c_TY: Tensor, state_SXY: Tensor, queries: Queries
) -> bool:
    return all_float32(u_TX, dt_TX, a_XY, b_TY, c_TY, state_SXY)


@compiled(selective_scan, _accepts, learns=True)
def _selective_scan_recomputed(
    kernels: Kernels,
    u_TX: Tensor,
    dt_TX: Tensor,
    a_XY: Tensor,
    b_TY: Tensor,
    c_TY: Tensor,
    state_SXY: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    y_TX, last_SXY = _SelectiveScan.apply(u_TX, dt_TX, a_XY, b_TY, c_TY, state_SXY, queries, kernels)  # type: ignore[no-untyped-call]
    return y_TX, last_SXY


@compiled(selective_scan, _accepts)
def _selective_scan(
    kernels: Kernels,
    u_TX: Tensor,
    dt_TX: Tensor,
    a_XY: Tensor,
    b_TY: Tensor,
    c_TY: Tensor,
    state_SXY: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    return _by_channel(kernels, (u_TX, dt_TX, b_TY, c_TY), a_XY, state_SXY, queries)


def _by_channel(
    kernels: Kernels,
    per_token: tuple[Tensor, ...],
    a_XY: Tensor,
    state_SXY: Tensor,
    queries: Queries,
    checkpoints_CXY: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan of u, dt, B and C."""
    (tokens, channels), states = per_token[0].shape, a_XY.shape[1]
    check_shapes(
        dt=(per_token[1], (tokens, channels)),
        A=(a_XY, (channels, states)),
        B=(per_token[2], (tokens, states)),
        C=(per_token[3], (tokens, states)),
        state=(state_SXY, (len(queries.positions), channels, states)),
    )
    sizes = (1, channels, 1, states)
    return _run(kernels.run.selective_scan, per_token, a_XY, state_SXY, sizes, queries, checkpoints_CXY)


class _SelectiveScan(torch.autograd.Function):
    """Keeps the states before every 32nd token; the backward pass makes those between them again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        u_TX: Tensor,
        dt_TX: Tensor,
        a_XY: Tensor,
        b_TY: Tensor,
        c_TY: Tensor,
        state_SXY: Tensor,
        queries: Queries,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        per_token = (u_TX, dt_TX, b_TY, c_TY)
        checkpoints = len(u_TX) // CHUNK + len(queries.positions)
        checkpoints_CXY = torch.empty((checkpoints, *a_XY.shape), dtype=torch.float32)
        results = _by_channel(kernels, per_token, a_XY, state_SXY, queries, checkpoints_CXY)
        ctx.save_for_backward(*per_token, a_XY, checkpoints_CXY)
        ctx.queries, ctx.kernels = queries, kernels
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TX: Tensor, d_last_SXY: Tensor) -> tuple[Tensor | None, ...]:
        *per_token, a_XY, checkpoints_CXY = ctx.saved_tensors
        u_TX, dt_TX, b_TY, c_TY = map(by_token, per_token)
        a_XY, d_y_TX, d_last_SXY = a_XY.contiguous(), d_y_TX.contiguous(), d_last_SXY.contiguous()
        (tokens, channels), states = u_TX.shape, a_XY.shape[1]
        by_block = (-(-channels // BLOCK), tokens, states)
        shapes = (u_TX.shape, dt_TX.shape, by_block, by_block, a_XY.shape, d_last_SXY.shape)
        d_u_TX, d_dt_TX, d_b_KTY, d_c_KTY, d_a_XY, d_state_SXY = gradients = [
            torch.empty(shape, dtype=torch.float32) for shape in shapes
        ]
        ctx.kernels.run.selective_scan_gradient(
            *map(rows, (u_TX, dt_TX, b_TY, c_TY)),
            tuple(map(address, (a_XY, checkpoints_CXY, d_y_TX, d_last_SXY))),
            tuple(map(address, gradients)),
            (channels, states, BLOCK),
            *span_arguments(tokens, ctx.queries),
            torch.get_num_threads(),
            CHUNK,
        )
        return d_u_TX, d_dt_TX, d_a_XY, d_b_KTY.sum(0), d_c_KTY.sum(0), d_state_SXY, None, None


def _accepts_heads(
    x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGY: Tensor, c_TGY: Tensor, state_SHPY: Tensor, queries: Queries
) -> bool:
    return all_float32(x_THP, dt_TH, a_H, b_TGY, c_TGY, state_SHPY)


@compiled(ssd, _accepts_heads)
def _ssd(
    kernels: Kernels,
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGY: Tensor,
    c_TGY: Tensor,
    state_SHPY: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    tokens, heads, channels = x_THP.shape
    groups, states = b_TGY.shape[1:]
    check_groups(heads, groups)
    check_shapes(
        dt=(dt_TH, (tokens, heads)),
        A=(a_H, (heads,)),
        B=(b_TGY, (tokens, groups, states)),
        C=(c_TGY, (tokens, groups, states)),
        state=(state_SHPY, (len(queries.positions), heads, channels, states)),
    )
    per_token = (x_THP, dt_TH, b_TGY, c_TGY)
    return _run(kernels.run.ssd, per_token, a_H, state_SHPY, (heads, channels, groups, states), queries)


def _run(
    run: Callable[..., None],
    per_token: tuple[Tensor, ...],
    a: Tensor,
    state: Tensor,
    sizes: tuple[int, int, int, int],
    queries: Queries,
    checkpoints: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u, dt, B and C are `per_token`; sizes: heads, channels of a head, groups, states; checkpoints: where the states
    before every 32nd token go."""
    per_token, a, state = tuple(map(by_token, per_token)), a.contiguous(), state.contiguous()
    y, last = (torch.empty(like.shape, dtype=torch.float32) for like in (per_token[0], state))
    places = tuple(map(address, (a, state, last, y)))
    run(
        *map(rows, per_token),
        *places,
        sizes,
        *span_arguments(len(y), queries),
        torch.get_num_threads(),
        address(checkpoints),
        CHUNK,
    )
    return y, last
