"""Selective scans (csrc/kernels/scan.cpp): Mamba-1's, and Mamba-2's with one decay a head."""

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.kernels.cpu.library import Kernels, address, compiled
from foveal.kernels.cpu.tokens import all_float32, by_token, check_groups, check_shapes, rows, span_arguments
from foveal.kernels.keys import Queries
from foveal.kernels.scan import selective_scan
from foveal.kernels.ssd import ssd


def _accepts(
    u_TX: Tensor, dt_TX: Tensor, a_XY: Tensor, b_TY: Tensor, c_TY: Tensor, state_SXY: Tensor, queries: Queries
) -> bool:
    return all_float32(u_TX, dt_TX, a_XY, b_TY, c_TY, state_SXY)


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
    tokens, channels = u_TX.shape
    states = a_XY.shape[1]
    check_shapes(
        dt=(dt_TX, (tokens, channels)),
        A=(a_XY, (channels, states)),
        B=(b_TY, (tokens, states)),
        C=(c_TY, (tokens, states)),
        state=(state_SXY, (len(queries.positions), channels, states)),
    )
    per_token = (u_TX, dt_TX, b_TY, c_TY)
    return _run(kernels.run.selective_scan, per_token, a_XY, state_SXY, (1, channels, 1, states), queries)


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
) -> tuple[Tensor, Tensor]:
    """u, dt, B and C are `per_token`; sizes: heads, channels of a head, groups, states."""
    per_token, a, state = tuple(map(by_token, per_token)), a.contiguous(), state.contiguous()
    y, last = (torch.empty(like.shape, dtype=torch.float32) for like in (per_token[0], state))
    places = tuple(map(address, (a, state, last, y)))
    run(*map(rows, per_token), *places, sizes, *span_arguments(len(y), queries), torch.get_num_threads())
    return y, last
