"""Linear attention and the delta rule (csrc/kernels/delta.cpp)."""

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.kernels.cpu.library import Kernels, address, compiled
from foveal.kernels.cpu.tokens import all_float32, by_token, check_groups, check_shapes, rows, span_arguments
from foveal.kernels.delta import delta_rule, linear_attention
from foveal.kernels.keys import Queries


def _accepts(
    q_TGP: Tensor, k_TGP: Tensor, v_THV: Tensor, decay_THP: Tensor, state_SHPV: Tensor, queries: Queries
) -> bool:
    return all_float32(q_TGP, k_TGP, v_THV, decay_THP, state_SHPV)


@compiled(linear_attention, _accepts)
def _linear_attention(
    kernels: Kernels,
    q_TGP: Tensor,
    k_TGP: Tensor,
    v_THV: Tensor,
    decay_THP: Tensor,
    state_SHPV: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    return _run(kernels.run.linear_attention, (q_TGP, k_TGP, v_THV, decay_THP), None, state_SHPV, queries)


def _accepts_delta(
    q_TGP: Tensor,
    k_TGP: Tensor,
    v_THV: Tensor,
    decay_THP: Tensor,
    beta_TH: Tensor,
    state_SHPV: Tensor,
    queries: Queries,
) -> bool:
    return all_float32(q_TGP, k_TGP, v_THV, decay_THP, beta_TH, state_SHPV)


@compiled(delta_rule, _accepts_delta)
def _delta_rule(
    kernels: Kernels,
    q_TGP: Tensor,
    k_TGP: Tensor,
    v_THV: Tensor,
    decay_THP: Tensor,
    beta_TH: Tensor,
    state_SHPV: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    return _run(kernels.run.delta_rule, (q_TGP, k_TGP, v_THV, decay_THP), beta_TH, state_SHPV, queries)


def _run(
    run: Callable[..., None],
    per_token: tuple[Tensor, ...],
    beta_TH: Tensor | None,
    state_SHPV: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    """q, k, v and decay are `per_token`."""
    q_TGP, k_TGP, v_THV, decay_THP = per_token = tuple(map(by_token, per_token))
    (tokens, heads, values), (groups, keys) = v_THV.shape, k_TGP.shape[1:]
    by_key = decay_THP.shape[2] != 1
    check_groups(heads, groups)
    check_shapes(
        q=(q_TGP, (tokens, groups, keys)),
        k=(k_TGP, (tokens, groups, keys)),
        decay=(decay_THP, (tokens, heads, keys if by_key else 1)),
        state=(state_SHPV, (len(queries.positions), heads, keys, values)),
    )
    if beta_TH is not None:
        check_shapes(beta=(beta_TH, (tokens, heads)))
        beta_TH = by_token(beta_TH)
    beta_rows = (0, 0) if beta_TH is None else rows(beta_TH)
    state_SHPV = state_SHPV.contiguous()
    o_THV, last_SHPV = (torch.empty(like.shape, dtype=torch.float32) for like in (v_THV, state_SHPV))
    places = tuple(map(address, (state_SHPV, last_SHPV, o_THV)))
    sizes = (heads, groups, keys, values)
    spans = span_arguments(tokens, queries)
    run(*map(rows, per_token), beta_rows, *places, sizes, by_key, *spans, torch.get_num_threads())
    return o_THV, last_SHPV
