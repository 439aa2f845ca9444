"""The indexer's warm-up loss and its gradients, tile by tile: nothing of the size tokens x context is ever stored.

One kernel sums up the softmax of attention (for every head) and one that of the index scores; the last compares the two
for each tile, and adds what follows for queries and weights (whose tile is one program's alone) and for keys
(atomically in float32, so their last bits depend on the order in which programs run).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu.code import LN2, product, softmax_step
from foveal.kernels.gpu.launch import AUTO, LOG2_E, Argument, Choice, Launch, Tiles, block_size, ceil_div
from foveal.kernels.gpu.places import Places


@triton.jit
def index_products(
    q_index, weights, k_index, token_M, row_N, live_M, seen_N, i, HEADS, J: tl.constexpr, BLOCK_J: tl.constexpr
):
    """ReLU(q.k) of one index head, and the head's weights."""
    at_M = (token_M * HEADS + i) * J
    products = product(q_index, k_index, at_M, row_N * J, live_M, seen_N, J, BLOCK_J)
    return tl.maximum(products, 0.0), tl.load(weights + token_M * HEADS + i, mask=live_M, other=0.0)


@triton.jit
def tile_of(queries, contexts, sequences, BLOCK_M: tl.constexpr):
    """A tile of a sequence's queries: their packed rows, whether they are there, positions, the keys they see together,
    and the sequence's first packed row."""
    s = tl.program_id(1).to(tl.int64)
    first = tl.load(queries + s)
    count = tl.load(queries + s + 1) - first
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    position_M = tl.load(queries + sequences + 1 + s) + m
    stop = tl.max(tl.where(m < count, position_M + 1, 0), 0)
    return first + m, m < count, position_M, stop, tl.load(contexts + sequences + s)


@triton.jit
def attention_lse_kernel(
    q,
    keys,
    lse,
    queries,
    contexts,
    sequences,
    H,
    groups,
    q_token,
    q_head,
    k_row,
    k_head,
    scale_log2,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Log-sum-exp to base 2 of one head's attention scores, for a tile of queries."""
    token_M, live_M, position_M, stop, start_row = tile_of(queries, contexts, sequences, BLOCK_M)
    if stop == 0:
        return
    head = tl.program_id(2)
    group = head // (H // groups)
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        at_N = (start_row + n) * k_row + group * k_head
        scores = product(q, keys, token_M * q_token + head * q_head, at_N, live_M, n < stop, P, BLOCK_P)
        scores = tl.where(n[None, :] <= position_M[:, None], scores * scale_log2, float("-inf"))
        _, _, most_M, total_M = softmax_step(scores, most_M, total_M)
    tl.store(lse + token_M * H + head, most_M + tl.log2(total_M), mask=live_M)


@triton.jit
def index_lse_kernel(
    q_index,
    weights,
    k_index,
    lse,
    queries,
    contexts,
    sequences,
    HEADS,
    J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Log-sum-exp (natural) of the index scores of a tile of queries."""
    token_M, live_M, position_M, stop, start_row = tile_of(queries, contexts, sequences, BLOCK_M)
    if stop == 0:
        return
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(HEADS):
            products, weight_M = index_products(
                q_index, weights, k_index, token_M, start_row + n, live_M, n < stop, i, HEADS, J, BLOCK_J
            )
            scores += products * weight_M[:, None]
        scores = tl.where(n[None, :] <= position_M[:, None], scores / LN2, float("-inf"))
        _, _, most_M, total_M = softmax_step(scores, most_M, total_M)
    tl.store(lse + token_M, (most_M + tl.log2(total_M)) * LN2, mask=live_M)


@triton.jit
def divergence_kernel(
    q_index,
    weights,
    k_index,
    q,
    keys,
    attention_lse,
    index_lse,
    token_weights,
    divergence,
    d_q_index,
    d_weights,
    d_k_index,
    queries,
    contexts,
    sequences,
    HEADS,
    H,
    groups,
    q_token,
    q_head,
    k_row,
    k_head,
    scale_log2,
    J: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """KL of a tile of queries, and the gradients of its weighted sum."""
    token_M, live_M, position_M, stop, start_row = tile_of(queries, contexts, sequences, BLOCK_M)
    if stop == 0:
        return
    j = tl.arange(0, BLOCK_J)
    divergence_M = tl.zeros([BLOCK_M], tl.float32)
    index_lse_M = tl.load(index_lse + token_M, mask=live_M, other=0.0)
    token_weight_M = tl.load(token_weights + token_M, mask=live_M, other=0.0)
    for at in range(0, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        seen = n < stop
        row_N = start_row + n
        visible = (n[None, :] <= position_M[:, None]) & live_M[:, None]
        target = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for head in range(H):
            at_N = row_N * k_row + head // (H // groups) * k_head
            scores = product(q, keys, token_M * q_token + head * q_head, at_N, live_M, seen, P, BLOCK_P)
            lse_M = tl.load(attention_lse + token_M * H + head, mask=live_M, other=0.0)
            target += tl.exp2(tl.where(visible, scores * scale_log2 - lse_M[:, None], float("-inf")))
        target = target / H
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(HEADS):
            products, weight_M = index_products(
                q_index, weights, k_index, token_M, row_N, live_M, seen, i, HEADS, J, BLOCK_J
            )
            scores += products * weight_M[:, None]
        log_share = scores - index_lse_M[:, None]
        part = tl.where(target > 0.0, target * (tl.log(tl.where(target > 0.0, target, 1.0)) - log_share), 0.0)
        divergence_M += tl.sum(part, 1)
        d_scores = tl.where(visible, tl.exp(tl.where(visible, log_share, 0.0)) - target, 0.0) * token_weight_M[:, None]
        at_NJ = (row_N * J)[:, None] + j[None, :]
        mask_NJ = seen[:, None] & (j < J)[None, :]
        d_k_NJ = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
        for i in range(HEADS):
            products, weight_M = index_products(
                q_index, weights, k_index, token_M, row_N, live_M, seen, i, HEADS, J, BLOCK_J
            )
            at_weight = d_weights + token_M * HEADS + i
            summed = tl.load(at_weight, mask=live_M, other=0.0) + tl.sum(products * d_scores, 1)
            tl.store(at_weight, summed, mask=live_M)
            d_products = tl.where(products > 0.0, d_scores * weight_M[:, None], 0.0).to(k_index.dtype.element_ty)
            at_MJ = ((token_M * HEADS + i) * J)[:, None] + j[None, :]
            mask_MJ = live_M[:, None] & (j < J)[None, :]
            k_NJ = tl.load(
                k_index + (row_N * J)[:, None] + j[None, :], mask=seen[:, None] & (j < J)[None, :], other=0.0
            )
            d_q = tl.load(d_q_index + at_MJ, mask=mask_MJ, other=0.0)
            d_q = tl.dot(d_products, k_NJ, d_q, input_precision="ieee")
            tl.store(d_q_index + at_MJ, d_q, mask=mask_MJ)
            q_MJ = tl.load(q_index + at_MJ, mask=mask_MJ, other=0.0)
            d_k_NJ = tl.dot(tl.trans(d_products), q_MJ, d_k_NJ, input_precision="ieee")
        tl.atomic_add(d_k_index + at_NJ, d_k_NJ, mask=mask_NJ, sem="relaxed")
        # What this block of keys added is read by the next, maybe by other threads.
        tl.debug_barrier()
    tl.store(divergence + token_M, divergence_M, mask=live_M)


@dataclass(frozen=True)
class Divergence:
    """What is launched, every token's KL, and the gradients of their weighted sum (all float32)."""

    launches: tuple[Launch, ...]
    divergence_T: Tensor
    d_q_TIJ: Tensor
    d_weights_TI: Tensor
    d_k_RJ: Tensor

    def run(self) -> "Divergence":
        """Launch everything."""
        for launch in self.launches:
            launch.run()
        return self


@dataclass(frozen=True)
class Gaze:
    """Where attention looks: its queries [T, H, P], packed keys [R, G, P] and scale."""

    q_THP: Tensor
    k_RGP: Tensor
    scale: float

    def arguments(self) -> dict[str, Argument]:
        """What kernels take of it; strides in numbers, the last ones are 1."""
        q_THP, k_RGP = (x if x.stride(2) == 1 else x.contiguous() for x in (self.q_THP, self.k_RGP))
        return {
            "q": q_THP,
            "keys": k_RGP,
            "H": q_THP.shape[1],
            "q_token": q_THP.stride(0),
            "q_head": q_THP.stride(1),
            "k_row": k_RGP.stride(0),
            "k_head": k_RGP.stride(1),
            "scale_log2": self.scale * LOG2_E,
        }


def index_arguments(q_TIJ: Tensor, weights_TI: Tensor, k_RJ: Tensor) -> dict[str, Argument]:
    """What kernels take of an indexer."""
    return {
        "q_index": q_TIJ.contiguous(),
        "weights": weights_TI.float().contiguous(),
        "k_index": k_RJ.contiguous(),
        "HEADS": q_TIJ.shape[1],
    }


def results(q_TIJ: Tensor, weights_TI: Tensor, k_RJ: Tensor) -> dict[str, Tensor]:
    """Zeros for what kernels compute, in the order of `Divergence`."""
    shapes = {"divergence": q_TIJ.shape[:1], "d_q_index": q_TIJ.shape, "d_weights": weights_TI.shape}
    shapes["d_k_index"] = k_RJ.shape
    return {name: torch.zeros(shape, dtype=torch.float32, device=q_TIJ.device) for name, shape in shapes.items()}


def warmup_divergence(
    q_TIJ: Tensor,
    weights_TI: Tensor,
    k_RJ: Tensor,
    gaze: Gaze,
    token_weights_T: Tensor,
    where: Places,
    longest: int,
    *,
    choice: Choice = AUTO,
) -> Divergence:
    """Plan `index_divergence` without a selection: q_TIJ and k_RJ in one dtype; longest: queries of a sequence."""
    tokens, _, size = q_TIJ.shape
    tiles = choice.tiles or (Tiles(64, 32, 8, 1) if q_TIJ.element_size() <= 2 else Tiles(16, 16, 4, 1))
    device, (_, attention_heads, width) = q_TIJ.device, gaze.q_THP.shape
    lse_TH = torch.empty(tokens, attention_heads, dtype=torch.float32, device=device)
    lse_T = torch.empty(tokens, dtype=torch.float32, device=device)
    computed = results(q_TIJ, weights_TI, k_RJ)
    placed: dict[str, Argument] = {"queries": where.queries, "contexts": where.contexts, "sequences": where.sequences}
    looking: dict[str, Argument] = {**gaze.arguments(), "groups": gaze.k_RGP.shape[1]}
    scoring = index_arguments(q_TIJ, weights_TI, k_RJ)
    compared: dict[str, Argument] = {
        "attention_lse": lse_TH,
        "index_lse": lse_T,
        "token_weights": token_weights_T.float().contiguous(),
        **computed,
    }
    blocks = {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys}
    at_index = {"J": size, "BLOCK_J": block_size(size)}
    at_attention = {"P": width, "BLOCK_P": min(64, block_size(width))}
    grid = (ceil_div(longest, tiles.rows), where.sequences)
    how = {"warps": tiles.warps, "stages": tiles.stages}
    launches = (
        Launch(
            attention_lse_kernel,
            (*grid, attention_heads),
            {**looking, **placed, "lse": lse_TH},
            {**blocks, **at_attention},
            **how,
        ),
        Launch(index_lse_kernel, grid, {**scoring, **placed, "lse": lse_T}, {**blocks, **at_index}, **how),
        Launch(
            divergence_kernel,
            grid,
            {**scoring, **looking, **placed, **compared},
            {**blocks, **at_index, **at_attention},
            **how,
        ),
    )
    return Divergence(launches, *computed.values())
