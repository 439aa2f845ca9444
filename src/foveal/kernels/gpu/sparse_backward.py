"""Gradients of attention over a selection: every query reads its rows again and adds its part to theirs.

A program has a tile of one query's heads of a group. It goes over the selection twice: for the log-sum-exp, then for
the gradients. What rows get is added atomically in float32, so the last bits depend on the order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu.code import chosen_rows, softmax_step
from foveal.kernels.gpu.device import card_of
from foveal.kernels.gpu.launch import AUTO, LOG2_E, Choice, Launch, Tiles, block_size, ceil_div


@triton.jit
def load_part(rows, at_X, seen_X, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers [FIRST, FIRST + COUNT) of some rows, padded with zeros to BLOCK."""
    p = tl.arange(0, BLOCK)
    return tl.load(rows + at_X[:, None] + FIRST + p[None, :], mask=seen_X[:, None] & (p < COUNT)[None, :], other=0.0)


@triton.jit
def add_part(rows, at_N, seen_N, sum_NX, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Add to numbers [FIRST, FIRST + COUNT) of some rows."""
    p = tl.arange(0, BLOCK)
    mask = seen_N[:, None] & (p < COUNT)[None, :]
    tl.atomic_add(rows + at_N[:, None] + FIRST + p[None, :], sum_NX, mask=mask, sem="relaxed")


@triton.jit
def backward_kernel(
    q,
    keys,
    values,
    out,
    d_out,
    rows,
    d_q,
    d_keys,
    d_values,
    q_token,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_token,
    out_head,
    d_out_token,
    d_out_head,
    H,
    groups,
    K,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    P1: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P1: tl.constexpr,
    BLOCK_P2: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Keys are read as their first P1 numbers and the rest, each padded to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) % groups
    m = (tl.program_id(1) // groups) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < GROUP
    head = group * GROUP + m
    DTYPE: tl.constexpr = q.dtype.element_ty
    at_q = token * q_token + head * q_head
    q1 = load_part(q, at_q, live, 0, P1, BLOCK_P1)
    if P > P1:
        q2 = load_part(q, at_q, live, P1, P - P1, BLOCK_P2)
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, K, BLOCK_N):
        row, seen = chosen_rows(rows + token * K, at, K, BLOCK_N)
        at_k = row * k_row + group * k_head
        scores = tl.dot(q1, tl.trans(load_part(keys, at_k, seen, 0, P1, BLOCK_P1)), input_precision="ieee")
        if P > P1:
            k2 = load_part(keys, at_k, seen, P1, P - P1, BLOCK_P2)
            scores += tl.dot(q2, tl.trans(k2), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
        _, _, most_M, total_M = softmax_step(scores, most_M, total_M)
    lse_M = tl.where(total_M == 0.0, 0.0, most_M + tl.log2(tl.where(total_M == 0.0, 1.0, total_M)))
    d_out_MV = load_part(d_out, token * d_out_token + head * d_out_head, live, 0, V, BLOCK_V)
    out_MV = load_part(out, token * out_token + head * out_head, live, 0, V, BLOCK_V)
    share_M = tl.sum(d_out_MV.to(tl.float32) * out_MV.to(tl.float32), 1)
    d_q1 = tl.zeros([BLOCK_M, BLOCK_P1], tl.float32)
    if P > P1:
        d_q2 = tl.zeros([BLOCK_M, BLOCK_P2], tl.float32)
    for at in range(0, K, BLOCK_N):
        row, seen = chosen_rows(rows + token * K, at, K, BLOCK_N)
        at_k = row * k_row + group * k_head
        k1 = load_part(keys, at_k, seen, 0, P1, BLOCK_P1)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if P > P1:
            k2 = load_part(keys, at_k, seen, P1, P - P1, BLOCK_P2)
            scores += tl.dot(q2, tl.trans(k2), input_precision="ieee")
        weights = tl.where(seen[None, :], tl.exp2(scores * scale_log2 - lse_M[:, None]), 0.0)
        v_NV = load_part(values, row * v_row + group * v_head, seen, 0, V, BLOCK_V)
        d_weights = tl.dot(d_out_MV, tl.trans(v_NV), input_precision="ieee")
        d_scores = (weights * (d_weights - share_M[:, None]) * scale).to(DTYPE)
        d_v = tl.dot(tl.trans(weights.to(DTYPE)), d_out_MV, input_precision="ieee")
        add_part(d_values, (row * groups + group) * V, seen, d_v, 0, V, BLOCK_V)
        d_q1 = tl.dot(d_scores, k1, d_q1, input_precision="ieee")
        d_k1 = tl.dot(tl.trans(d_scores), q1, input_precision="ieee")
        add_part(d_keys, (row * groups + group) * P, seen, d_k1, 0, P1, BLOCK_P1)
        if P > P1:
            d_q2 = tl.dot(d_scores, k2, d_q2, input_precision="ieee")
            d_k2 = tl.dot(tl.trans(d_scores), q2, input_precision="ieee")
            add_part(d_keys, (row * groups + group) * P, seen, d_k2, P1, P - P1, BLOCK_P2)
    row_M = (token * H + head) * P
    p = tl.arange(0, BLOCK_P1)
    mask = live[:, None] & (p < P1)[None, :]
    tl.store(d_q + row_M[:, None] + p[None, :], d_q1.to(d_q.dtype.element_ty), mask=mask)
    if P > P1:
        p = tl.arange(0, BLOCK_P2)
        mask = live[:, None] & (p < P - P1)[None, :]
        tl.store(d_q + row_M[:, None] + P1 + p[None, :], d_q2.to(d_q.dtype.element_ty), mask=mask)


def tiles_for(roomy: bool, group: int, width: int, itemsize: int) -> Tiles:
    """Tiles whose queries, their gradients, keys and values fit into shared memory (docs/gpu.md)."""
    if width <= 128 and itemsize <= 2:
        return Tiles(min(64, block_size(group)), 32, 4, 1)
    if itemsize > 2:
        return Tiles(16, 16, 4, 1)
    return Tiles(min(32, block_size(group)), 32, 8, 1) if roomy else Tiles(16, 16, 4, 1)


def sparse_backward(
    q_THP: Tensor,
    k_RGP: Tensor,
    v_RGV: Tensor,
    out_THV: Tensor,
    d_out_THV: Tensor,
    rows_TK: Tensor,
    *,
    scale: float,
    choice: Choice = AUTO,
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """Plan `sparse_gradients`: the launch, d_q in q's dtype, d_k and d_v in float32."""
    tokens, heads, width = q_THP.shape
    groups, value_width = v_RGV.shape[1:]
    tensors = (q_THP, k_RGP, v_RGV, out_THV, d_out_THV)
    q_THP, k_RGP, v_RGV, out_THV, d_out_THV = (x if x.stride(2) == 1 else x.contiguous() for x in tensors)
    group, first = heads // groups, 1 << (width.bit_length() - 1)
    card = choice.card or card_of(q_THP.device)
    tiles = choice.tiles or tiles_for(card.roomy, group, max(width, value_width), q_THP.element_size())
    d_q_THP = torch.empty(q_THP.shape, dtype=q_THP.dtype, device=q_THP.device)
    d_k_RGP = torch.zeros(k_RGP.shape, dtype=torch.float32, device=q_THP.device)
    d_v_RGV = torch.zeros(v_RGV.shape, dtype=torch.float32, device=q_THP.device)
    launch = Launch(
        backward_kernel,
        (tokens, groups * ceil_div(group, tiles.rows)),
        {
            "q": q_THP,
            "keys": k_RGP,
            "values": v_RGV,
            "out": out_THV,
            "d_out": d_out_THV,
            "rows": rows_TK.contiguous(),
            "d_q": d_q_THP,
            "d_keys": d_k_RGP,
            "d_values": d_v_RGV,
            "q_token": q_THP.stride(0),
            "q_head": q_THP.stride(1),
            "k_row": k_RGP.stride(0),
            "k_head": k_RGP.stride(1),
            "v_row": v_RGV.stride(0),
            "v_head": v_RGV.stride(1),
            "out_token": out_THV.stride(0),
            "out_head": out_THV.stride(1),
            "d_out_token": d_out_THV.stride(0),
            "d_out_head": d_out_THV.stride(1),
            "H": heads,
            "groups": groups,
            "K": rows_TK.shape[1],
            "scale": scale,
            "scale_log2": scale * LOG2_E,
        },
        {
            "GROUP": group,
            "P": width,
            "P1": first,
            "V": value_width,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.keys,
            "BLOCK_P1": block_size(first),
            "BLOCK_P2": block_size(width - first),
            "BLOCK_V": block_size(value_width),
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )
    return launch, d_q_THP, d_k_RGP, d_v_RGV
