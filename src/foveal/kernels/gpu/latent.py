"""Absorbed latent attention: one key row for all heads, its first numbers the value; over a selection or all keys.

A program computes a tile of rows (heads of one query for a selection; queries with their heads otherwise) over one
range of keys. Latent rows are read once for both products, in place through the page table, fp8 records included.
Where few programs would run, the keys are cut into ranges (`combine`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.config.formats import LATENT_BLOCK, latent_bytes
from foveal.kernels.gpu.code import LATENT_BLOCK as BLOCK
from foveal.kernels.gpu.code import LN2, e4m3_values, row_of, share_of, softmax_step
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
from foveal.kernels.gpu.stored import Latents, latents_of
from foveal.kernels.keys import KeySource, Queries


@triton.jit
def latent_values(
    values,
    scales,
    row_N,
    seen_N,
    c_C,
    C,
    STRIDE: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Latents [N, C] of some rows, decoded; zeros where not `seen`, whatever is stored there."""
    mask = seen_N[:, None] & (c_C < C)[None, :]
    stored = tl.load(values + row_N[:, None] * STRIDE + c_C[None, :], mask=mask, other=0)
    if FP8:
        SPAN: tl.constexpr = min(c_C.shape[0], BLOCK)
        BLOCKS: tl.constexpr = c_C.shape[0] // SPAN
        b = tl.arange(0, BLOCKS)
        at = row_N[:, None] * (STRIDE // 4) + (C // 4 + b)[None, :]
        scale_NB = tl.load(scales + at, mask=seen_N[:, None] & (b * BLOCK < C)[None, :], other=0.0)
        numbers = tl.reshape(e4m3_values(stored, NATIVE), [row_N.shape[0], BLOCKS, SPAN])
        stored = tl.reshape(numbers * scale_NB[:, :, None], [row_N.shape[0], c_C.shape[0]])
    return stored.to(DTYPE)


@triton.jit
def latent_kernel(
    q,
    values,
    scales,
    rope,
    out,
    lse,
    selection,
    sequence_of,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of query rows over one range of keys. Results are divided by their totals; `lse` is to base 2 where there
    are several ranges, natural otherwise."""
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    if SELECTED:
        tiles = tl.cdiv(H, BLOCK_M)
        token = (tl.program_id(0) // tiles).to(tl.int64)
        head = (tl.program_id(0) % tiles) * BLOCK_M + m
        s = tl.load(sequence_of + token).to(tl.int64)
        live = head < H
        row_M = token * H + head
        # The entries up to the last that is a position.
        k = tl.arange(0, BLOCK_K)
        entry = tl.load(selection + token * K + k, mask=k < K, other=-1)
        stop = tl.max(tl.where(entry >= 0, k + 1, 0), 0)
        position_M = m
    else:
        s = tl.program_id(2).to(tl.int64)
        first = tl.load(queries + s)
        count = tl.load(queries + s + 1) - first
        lower = tl.program_id(0) * BLOCK_M
        if lower >= count * H:
            return
        position = tl.load(queries + sequences + 1 + s)
        live = lower + m < count * H
        row_M = first * H + lower + m
        position_M = position + (lower + m) // H
        stop = position + tl.minimum((lower + BLOCK_M - 1) // H, count - 1) + 1
        token = first
    length = tl.load(contexts + s)
    start_row = tl.load(contexts + sequences + s)
    table_row = table + s * table_stride
    DTYPE: tl.constexpr = q.dtype.element_ty
    c = tl.arange(0, BLOCK_C)
    q_MC = tl.load(q + row_M[:, None] * (C + R) + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0)
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        q_MR = tl.load(q + row_M[:, None] * (C + R) + C + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    sum_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    begin, end = share_of(stop, split, splits, BLOCK_N)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        seen = n < end
        if SELECTED:
            n = tl.load(selection + token * K + n, mask=seen, other=-1)
            seen = seen & (n >= 0) & (n < length)
        row_N = row_of(n.to(tl.int64), seen, start_row, table_row, PAGED)
        k_NC = latent_values(values, scales, row_N, seen, c, C, STRIDE, FP8, NATIVE, DTYPE)
        scores = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee")
        if R > 0:
            at_NR = row_N[:, None] * ROPE_STRIDE + ROPE_AT + r[None, :]
            k_NR = tl.load(rope + at_NR, mask=seen[:, None] & (r < R)[None, :], other=0.0).to(DTYPE)
            scores += tl.dot(q_MR, tl.trans(k_NR), input_precision="ieee")
        visible = seen[None, :] if SELECTED else seen[None, :] & (n[None, :] <= position_M[:, None])
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        weights, fade, most_M, total_M = softmax_step(scores, most_M, total_M)
        sum_MC = sum_MC * fade[:, None]
        sum_MC = tl.dot(weights.to(DTYPE), k_NC, sum_MC, input_precision="ieee")
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

    rows: those that share keys.
    """
    if itemsize > 2:
        return Tiles(16, 16 if latents.rank > 128 else 32, 4, 1)
    if card.roomy:
        keys = 64 if card.capability >= 90 and not latents.fp8 else 32
        tile = min(64, block_size(rows))
        return Tiles(tile, keys, 8 if tile == 64 else 4, 1)
    tile = min(32, block_size(rows))
    return Tiles(tile, 32, 8, 1) if latents.fp8 and tile == 32 else Tiles(tile, 32, 4, 2)


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
    selected: dict[str, Argument] = {
        "selection": where.queries if selection_TK is None else selection_TK.contiguous(),
        "sequence_of": where.queries if selection_TK is None else queries.sequence_on(q_THX.device),
        "K": 0 if selection_TK is None else selection_TK.shape[1],
    }
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
            "BLOCK_K": block_size(0 if selection_TK is None else longest),
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )
    last = () if splits == 1 else (combine(partial, partial_lse, out_THC, lse_TH),)
    return Work((launch, *last), out_THC, lse_TH)


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
