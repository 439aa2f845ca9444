"""Absorbed latent attention: one key row for all heads, its first numbers the value; over a selection or all keys.

A program computes a tile of rows (heads of one query for a selection, whose rows `rows.py` has looked up; queries with
their heads otherwise) over one range of keys. Latent rows are read once for both products, in place, fp8 records
included. Where few programs would run, the keys are cut into ranges (`combine`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.config.formats import LATENT_BLOCK, latent_bytes
from foveal.kernels.gpu.code import LATENT_BLOCK as BLOCK
from foveal.kernels.gpu.code import LN2, PAGE_SIZE, block_places, e4m3_values, share_of, softmax_step
from foveal.kernels.gpu.combine import combine, partial_results
from foveal.kernels.gpu.device import Card, card_of
from foveal.kernels.gpu.launch import (
    AUTO,
    LOG2_E,
    Argument,
    Choice,
    Launch,
    Tiles,
    Work,
    block_size,
    ceil_div,
    choose_splits,
)
from foveal.kernels.gpu.places import places
from foveal.kernels.gpu.rows import selected_rows
from foveal.kernels.gpu.stored import Latents, latents_of
from foveal.kernels.keys import KeySource, Queries


@triton.jit
def block_rows(rows, at, end, start_row, table_row, SELECTED: tl.constexpr, PAGED: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64 rows of keys [at, at + BLOCK_N) below `end` (entries of a selection, else positions within one page), and
    whether they are there."""
    n = at + tl.arange(0, BLOCK_N)
    seen_N = n < end
    if SELECTED:
        row_N = tl.load(rows + n, mask=seen_N, other=-1).to(tl.int64)
        seen_N = row_N >= 0
    else:
        page, place_N = block_places(at, end, start_row, table_row, PAGED, BLOCK_N)
        row_N = page * PAGE_SIZE + place_N
    return row_N, seen_N


@triton.jit
def load_keys(
    values,
    scales,
    rope,
    row_N,
    seen_N,
    C: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    ROPE_AT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Latents [N, C] of some rows as they are stored, their scales [N, blocks] and rope keys [N, R]; zeros where not
    `seen`, whatever is stored there."""
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    mask = seen_N[:, None] & (c < C)[None, :]
    stored_NC = tl.load(values + row_N[:, None] * STRIDE + c[None, :], mask=mask, other=0)
    b = tl.arange(0, triton.cdiv(BLOCK_C, BLOCK))
    scale_NB = tl.full([1, b.shape[0]], 1.0, tl.float32)
    if FP8:
        at = row_N[:, None] * (STRIDE // 4) + (C // 4 + b)[None, :]
        scale_NB = tl.load(scales + at, mask=seen_N[:, None] & (b * BLOCK < C)[None, :], other=0.0)
    at_NR = row_N[:, None] * ROPE_STRIDE + ROPE_AT + r[None, :]
    return stored_NC, scale_NB, tl.load(rope + at_NR, mask=seen_N[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def latent_values(stored_NC, scale_NB, FP8: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """Stored latents decoded: values times the scale of their block."""
    if FP8:
        N: tl.constexpr = stored_NC.shape[0]
        BLOCKS: tl.constexpr = scale_NB.shape[1]
        numbers, unit = e4m3_values(stored_NC, NATIVE)
        scaled = tl.reshape(numbers, [N, BLOCKS, stored_NC.shape[1] // BLOCKS]) * (scale_NB * unit)[:, :, None]
        stored_NC = tl.reshape(scaled, [N, stored_NC.shape[1]])
    return stored_NC.to(DTYPE)


@triton.jit
def weigh(q_MC, q_MR, k_NC, k_NR, visible, scale_log2, most_M, total_M, APART: tl.constexpr):
    """One step of the softmax over a block of keys, see `softmax_step`."""
    if APART:
        # Two products that do not feed one another, see `latent_kernel`.
        scores = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee") * scale_log2
        scores += tl.dot(q_MR, tl.trans(k_NR), input_precision="ieee") * scale_log2
    else:
        scores = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee")
        scores = tl.dot(q_MR, tl.trans(k_NR), scores, input_precision="ieee") * scale_log2
    weights, fade, most_M, total_M = softmax_step(tl.where(visible, scores, float("-inf")), most_M, total_M)
    return weights.to(k_NC.dtype), fade, most_M, total_M


@triton.jit
def latent_kernel(
    q,
    values,
    scales,
    rope,
    out,
    lse,
    rows,
    stops,
    queries,
    contexts,
    table,
    table_stride,
    sequences,
    H,
    splits,
    K,
    rows_out,
    scale_log2,
    C: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    ROPE_AT: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    SELECTED: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGED: tl.constexpr,
    AHEAD: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of query rows over one range of keys. Results are divided by their totals; `lse` is to base 2 where there
    are several ranges, natural otherwise.

    AHEAD: the next block of keys is loaded into registers while this one is computed; else the compiler does so, by
    asynchronous copies into shared memory. On SM8x and SM12x it would decode those once for each product.
    APART: scores are computed in a branch (that is always taken). On SM90 a product whose result another one reads gets
    its warps along its rows alone, and with 64 rows half of them would do the others' work again. The compiler looks no
    farther than the end of a branch.
    """
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    if SELECTED:
        tiles = tl.cdiv(H, BLOCK_M)
        token = (tl.program_id(0) // tiles).to(tl.int64)
        head = (tl.program_id(0) % tiles) * BLOCK_M + m
        live = head < H
        row_M = token * H + head
        rows += token * K
        stop = tl.load(stops + token)
        start_row = 0
        table_row = table
        position_M = m
    else:
        s = tl.program_id(2).to(tl.int64)
        first = tl.load(queries + s)
        count = (tl.load(queries + s + 1) - first).to(tl.int32)
        lower = tl.program_id(0) * BLOCK_M
        if lower >= count * H:
            return
        position = tl.load(queries + sequences + 1 + s).to(tl.int32)
        live = lower + m < count * H
        row_M = first * H + lower + m
        position_M = position + (lower + m) // H
        stop = position + tl.minimum((lower + BLOCK_M - 1) // H, count - 1) + 1
        start_row = tl.load(contexts + sequences + s)
        table_row = table + s * table_stride
    DTYPE: tl.constexpr = q.dtype.element_ty
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    q_MC = tl.load(q + row_M[:, None] * (C + R) + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0)
    q_MR = tl.load(q + row_M[:, None] * (C + R) + C + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    sum_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    begin, end = share_of(stop, split, splits, BLOCK_N)
    if AHEAD:
        row_N, seen = block_rows(rows, begin, end, start_row, table_row, SELECTED, PAGED, BLOCK_N)
        stored, scale_NB, stored_NR = load_keys(
            values, scales, rope, row_N, seen, C, R, STRIDE, ROPE_STRIDE, ROPE_AT, FP8, BLOCK_C, BLOCK_R
        )
    for at in range(begin, end, BLOCK_N):
        row_N, seen = block_rows(rows, at, end, start_row, table_row, SELECTED, PAGED, BLOCK_N)
        if not AHEAD:
            stored, scale_NB, stored_NR = load_keys(
                values, scales, rope, row_N, seen, C, R, STRIDE, ROPE_STRIDE, ROPE_AT, FP8, BLOCK_C, BLOCK_R
            )
        k_NC = latent_values(stored, scale_NB, FP8, NATIVE, DTYPE)
        k_NR = stored_NR.to(DTYPE)
        if AHEAD:
            next_N, there = block_rows(rows, at + BLOCK_N, end, start_row, table_row, SELECTED, PAGED, BLOCK_N)
            stored, scale_NB, stored_NR = load_keys(
                values, scales, rope, next_N, there, C, R, STRIDE, ROPE_STRIDE, ROPE_AT, FP8, BLOCK_C, BLOCK_R
            )
        visible = seen[None, :]
        if not SELECTED:
            visible = visible & ((at + tl.arange(0, BLOCK_N))[None, :] <= position_M[:, None])
        if APART:
            weights = tl.zeros([BLOCK_M, BLOCK_N], DTYPE)
            fade = tl.full([BLOCK_M], 1.0, tl.float32)
            if at < stop:
                weights, fade, most_M, total_M = weigh(
                    q_MC, q_MR, k_NC, k_NR, visible, scale_log2, most_M, total_M, APART
                )
        else:
            weights, fade, most_M, total_M = weigh(q_MC, q_MR, k_NC, k_NR, visible, scale_log2, most_M, total_M, APART)
        sum_MC = tl.dot(weights, k_NC, sum_MC * fade[:, None], input_precision="ieee")
    sum_MC = sum_MC / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    lse_M = tl.where(total_M == 0.0, float("-inf"), most_M + tl.log2(tl.where(total_M == 0.0, 1.0, total_M)))
    if SPLIT:
        row_M += split.to(tl.int64) * rows_out
    else:
        lse_M = lse_M * LN2
    mask = live[:, None] & (c < C)[None, :]
    tl.store(out + row_M[:, None] * C + c[None, :], sum_MC.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row_M, lse_M, mask=live)


def tiles_for(card: Card, latents: Latents, rows: int, itemsize: int) -> Tiles:
    """Tiles whose queries and keys fit into the card's shared memory and registers (docs/gpu.md).

    rows: those that share keys. One stage: see AHEAD in `latent_kernel`.
    """
    if itemsize > 2:
        return Tiles(16, 16 if latents.rank > 128 else 32, 4, 1)
    tile = min(64 if card.roomy else 32, block_size(rows))
    if not latents.fp8:
        return Tiles(tile, 32, 8, 2)
    if tile < 64 or not card.reads_shared:
        return Tiles(tile, 32, 8, 1)
    # With two stages Triton 3.7 for SM100 decodes the second block over the first, which a product still reads.
    return Tiles(tile, 64, 8, 1 if card.capability >= 100 else 2)


def latent_attention(
    q_THX: Tensor,
    keys: KeySource,
    values: KeySource,
    selection_TK: Tensor | None,
    queries: Queries,
    *,
    scale: float,
    choice: Choice = AUTO,
) -> Work:
    """Plan attention over all earlier keys, or over a selection (int32), for arguments that `latents_of` takes.

    Entries of a selection that are no position of their sequence count as -1: looking for them would make the host
    wait. ValueError where shapes do not fit.
    """
    latents = latents_of(keys, values)
    assert latents is not None
    tokens, heads, width = q_THX.shape
    _check_widths(width, latents)
    where = places(queries, keys.contexts, tokens, q_THX.device)
    q_THX, card = q_THX.contiguous(), choice.card or card_of(q_THX.device)
    rows = heads if selection_TK is not None else heads * max(queries.lengths, default=0)
    tiles = choice.tiles or tiles_for(card, latents, rows, q_THX.element_size())
    longest = selection_TK.shape[1] if selection_TK is not None else max(keys.contexts.lengths, default=0)
    per_sequence = ceil_div(rows, tiles.rows)
    programs = per_sequence * (tokens if selection_TK is not None else len(queries.positions))
    splits = choice.splits or choose_splits(programs, ceil_div(longest, tiles.keys), card.processors)
    out_THC = torch.empty(tokens, heads, latents.rank, dtype=q_THX.dtype, device=q_THX.device)
    lse_TH = torch.empty(tokens, heads, dtype=torch.float32, device=q_THX.device)
    partial, partial_lse = (out_THC, lse_TH) if splits == 1 else partial_results(splits, out_THC)
    before: tuple[Launch, ...] = ()
    selected: dict[str, Argument] = {"rows": where.queries, "stops": where.queries, "K": 0}
    if selection_TK is not None:
        lookup, rows_TK, stops_T = selected_rows(selection_TK, queries, where)
        before, selected = (lookup,), {"rows": rows_TK, "stops": stops_T, "K": selection_TK.shape[1]}
    launch = Launch(
        latent_kernel,
        (programs, splits, 1) if selection_TK is not None else (per_sequence, splits, len(queries.positions)),
        {
            "q": q_THX,
            "out": partial,
            "lse": partial_lse,
            "H": heads,
            "splits": splits,
            "rows_out": tokens * heads,
            "scale_log2": scale * LOG2_E,
            **selected,
            **stored_arguments(latents, q_THX.dtype),
            **where.arguments(),
        },
        {
            **row_constants(latents, width - latents.rank, card),
            "SELECTED": selection_TK is not None,
            "SPLIT": splits > 1,
            "PAGED": where.paged,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.keys,
            "BLOCK_C": block_size(latents.rank),
            "BLOCK_R": block_size(width - latents.rank),
            **_ways(card, tiles),
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )
    last = () if splits == 1 else (combine(partial, partial_lse, out_THC, lse_TH),)
    return Work((*before, launch, *last), out_THC, lse_TH)


def _ways(card: Card, tiles: Tiles) -> dict[str, bool]:
    """How keys are loaded and scores are computed, see `latent_kernel`."""
    return {
        "AHEAD": tiles.stages == 1,
        "APART": tiles.rows >= 64 and card.capability // 10 == 9,
    }


def stored_arguments(latents: Latents, dtype: torch.dtype) -> dict[str, Argument]:
    """The stored rows as what their parts are: values, scales, rope keys."""
    if not latents.fp8:
        return {"values": latents.rows, "scales": latents.rows, "rope": latents.rows}
    rows = latents.rows
    return {"values": rows, "scales": rows.view(torch.float32), "rope": rows.view(torch.bfloat16)}


def row_constants(latents: Latents, rope_dim: int, card: Card) -> dict[str, int | bool]:
    """Sizes of a stored row, and where its rope key begins."""
    stride, rank = latents.rows.stride(0), latents.rank
    rope_at = (rank + 4 * ceil_div(rank, LATENT_BLOCK)) // 2 if latents.fp8 else rank
    return {
        "C": rank,
        "R": rope_dim,
        "STRIDE": stride,
        "ROPE_STRIDE": stride // 2 if latents.fp8 else stride,
        "ROPE_AT": rope_at,
        "FP8": latents.fp8,
        "NATIVE": card.native_e4m3,
    }


def _check_widths(width: int, latents: Latents) -> None:
    expected = latent_bytes(latents.rank, width - latents.rank, "fp8") if latents.fp8 else width
    if latents.rank > width or latents.rows.shape[1] != expected:
        what = f"queries are {width} wide and values {latents.rank}"
        raise ValueError(f"{what}: latent rows need {expected} numbers, not {latents.rows.shape[1]}")
