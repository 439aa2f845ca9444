"""The indexer's loss over a selection, and its gradients: every query is alone with the keys selected for it.

A program has one query, so the rows of its products are heads. One kernel sums up attention's softmax for every head;
the other goes over the selection twice, for the softmax of the index scores, and to compare the two. Queries and
weights are one program's alone; what index keys get is added atomically in float32, so their last bits depend on the
order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu.code import LN2, chosen_rows, product, softmax_step
from foveal.kernels.gpu.launch import AUTO, Argument, Choice, Launch, Tiles, block_size, ceil_div
from foveal.kernels.gpu.warmup import Divergence, Gaze, index_arguments, results


@triton.jit
def heads_of(tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile of the heads of one group: their numbers, whether they are there, and the group."""
    TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    m = tile % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile // TILES * GROUP + m, m < GROUP, tile // TILES


@triton.jit
def selected_lse_kernel(
    q,
    keys,
    rows,
    token_weights,
    lse,
    H,
    K,
    q_token,
    q_head,
    k_row,
    k_head,
    scale_log2,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Log-sum-exp to base 2 of the attention scores of a tile of one query's heads."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(token_weights + token) == 0.0:
        return
    head_M, live_M, group = heads_of(tl.program_id(1), GROUP, BLOCK_M)
    at_M = token * q_token + head_M * q_head
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, K, BLOCK_N):
        row_N, seen_N = chosen_rows(rows + token * K, at, K, BLOCK_N)
        scores = product(q, keys, at_M, row_N * k_row + group * k_head, live_M, seen_N, P, BLOCK_P)
        scores = tl.where(seen_N[None, :], scores * scale_log2, float("-inf"))
        _, _, most_M, total_M = softmax_step(scores, most_M, total_M)
    tl.store(lse + token * H + head_M, most_M + tl.log2(tl.where(total_M == 0.0, 1.0, total_M)), mask=live_M)


@triton.jit
def index_tile(q_IJ, weight_I, k_index, row_N, seen_N, J: tl.constexpr, BLOCK_J: tl.constexpr):
    """Index keys [N, J], ReLU(q.k) of all heads [I, N], and the index scores [N] to base 2."""
    j = tl.arange(0, BLOCK_J)
    at_NJ = row_N[:, None] * J + j[None, :]
    k_NJ = tl.load(k_index + at_NJ, mask=seen_N[:, None] & (j < J)[None, :], other=0.0)
    products_IN = tl.maximum(tl.dot(q_IJ, tl.trans(k_NJ), input_precision="ieee"), 0.0)
    return k_NJ, products_IN, tl.sum(products_IN * weight_I[:, None], 0) / LN2


@triton.jit
def selected_divergence_kernel(
    q_index,
    weights,
    k_index,
    q,
    keys,
    rows,
    token_weights,
    lse,
    divergence,
    d_q_index,
    d_weights,
    d_k_index,
    HEADS,
    H,
    K,
    tiles,
    q_token,
    q_head,
    k_row,
    k_head,
    scale_log2,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """KL of one query, and the gradients of its weighted share of the sum."""
    token = tl.program_id(0).to(tl.int64)
    token_weight = tl.load(token_weights + token)
    if token_weight == 0.0:
        return
    DTYPE: tl.constexpr = k_index.dtype.element_ty
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    at_IJ = (token * HEADS + i[:, None]) * J + j[None, :]
    mask_IJ = (i < HEADS)[:, None] & (j < J)[None, :]
    q_IJ = tl.load(q_index + at_IJ, mask=mask_IJ, other=0.0)
    weight_I = tl.load(weights + token * HEADS + i, mask=i < HEADS, other=0.0)
    most_1 = tl.full([1], float("-inf"), tl.float32)
    total_1 = tl.zeros([1], tl.float32)
    for at in range(0, K, BLOCK_N):
        row_N, seen_N = chosen_rows(rows + token * K, at, K, BLOCK_N)
        _, _, score_N = index_tile(q_IJ, weight_I, k_index, row_N, seen_N, J, BLOCK_J)
        score_N = tl.where(seen_N, score_N, float("-inf"))
        _, _, most_1, total_1 = softmax_step(score_N[None, :], most_1, total_1)
    index_lse = tl.sum(most_1 + tl.log2(tl.where(total_1 == 0.0, 1.0, total_1)), 0)
    divergence_N = tl.zeros([BLOCK_N], tl.float32)
    d_weight_I = tl.zeros([BLOCK_I], tl.float32)
    d_q_IJ = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for at in range(0, K, BLOCK_N):
        row_N, seen_N = chosen_rows(rows + token * K, at, K, BLOCK_N)
        target_N = tl.zeros([BLOCK_N], tl.float32)
        for tile in range(tiles):
            head_M, live_M, group = heads_of(tile, GROUP, BLOCK_M)
            at_M = token * q_token + head_M * q_head
            scores = product(q, keys, at_M, row_N * k_row + group * k_head, live_M, seen_N, P, BLOCK_P)
            lse_M = tl.load(lse + token * H + head_M, mask=live_M, other=0.0)
            seen = live_M[:, None] & seen_N[None, :]
            target_N += tl.sum(tl.exp2(tl.where(seen, scores * scale_log2 - lse_M[:, None], float("-inf"))), 0)
        target_N = target_N / H
        k_NJ, products_IN, score_N = index_tile(q_IJ, weight_I, k_index, row_N, seen_N, J, BLOCK_J)
        log_share_N = tl.where(seen_N, score_N - index_lse, 0.0)
        log_target_N = tl.log2(tl.where(target_N > 0.0, target_N, 1.0))
        divergence_N += tl.where(target_N > 0.0, target_N * (log_target_N - log_share_N) * LN2, 0.0)
        # The token's weight comes last, in float32: in float16 many of these products would become 0 with it.
        d_score_N = tl.where(seen_N, tl.exp2(log_share_N) - target_N, 0.0)
        d_weight_I += tl.sum(products_IN * d_score_N[None, :], 1)
        gated_IN = tl.where(products_IN > 0.0, d_score_N[None, :], 0.0)
        d_q_IJ = tl.dot(gated_IN.to(DTYPE), k_NJ, d_q_IJ, input_precision="ieee")
        d_products = (gated_IN * weight_I[:, None]).to(DTYPE)
        d_k_NJ = tl.dot(tl.trans(d_products), q_IJ, input_precision="ieee") * token_weight
        at_NJ = row_N[:, None] * J + j[None, :]
        tl.atomic_add(d_k_index + at_NJ, d_k_NJ, mask=seen_N[:, None] & (j < J)[None, :], sem="relaxed")
    tl.store(divergence + token, tl.sum(divergence_N, 0))
    tl.store(d_weights + token * HEADS + i, d_weight_I * token_weight, mask=i < HEADS)
    tl.store(d_q_index + at_IJ, d_q_IJ * (weight_I * token_weight)[:, None], mask=mask_IJ)


def selected_divergence(
    q_TIJ: Tensor,
    weights_TI: Tensor,
    k_RJ: Tensor,
    gaze: Gaze,
    token_weights_T: Tensor,
    rows_TK: Tensor,
    *,
    choice: Choice = AUTO,
) -> Divergence:
    """Plan `index_divergence` over selected packed rows (int64, -1 = none): q_TIJ and k_RJ in one dtype."""
    tokens, heads, size = q_TIJ.shape
    (_, attention_heads, width), groups = gaze.q_THP.shape, gaze.k_RGP.shape[1]
    group = attention_heads // groups
    tiles = choice.tiles or _tiles(group, q_TIJ.element_size())
    head_tiles = groups * ceil_div(group, tiles.rows)
    computed = results(q_TIJ, weights_TI, k_RJ)
    looking: dict[str, Argument] = {
        **gaze.arguments(),
        "rows": rows_TK.contiguous(),
        "token_weights": token_weights_T.float().contiguous(),
        "lse": torch.empty(tokens, attention_heads, dtype=torch.float32, device=q_TIJ.device),
        "K": rows_TK.shape[1],
    }
    scoring: dict[str, Argument] = {**index_arguments(q_TIJ, weights_TI, k_RJ), **computed, "tiles": head_tiles}
    blocks = {
        "GROUP": group,
        "P": width,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_P": min(64, block_size(width)),
    }
    at_index = {"J": size, "BLOCK_I": block_size(heads), "BLOCK_J": block_size(size)}
    how = {"warps": tiles.warps, "stages": tiles.stages}
    launches = (
        Launch(selected_lse_kernel, (tokens, head_tiles), looking, blocks, **how),
        Launch(selected_divergence_kernel, (tokens,), {**scoring, **looking}, {**blocks, **at_index}, **how),
    )
    return Divergence(launches, *computed.values())


def _tiles(group: int, itemsize: int) -> Tiles:
    """Heads of a group and keys of a block that fit into registers and shared memory (docs/gpu.md)."""
    return Tiles(min(64, block_size(group)), 32, 8, 3) if itemsize <= 2 else Tiles(16, 16, 4, 1)
