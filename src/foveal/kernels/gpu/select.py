"""Score and select: index scores and their exact top-k in one stream, without a buffer of scores.

A program scores blocks of keys for a few queries over one range of the context and appends what beats the lowest
score kept so far to a small list of (score, position), in order of position. When a list is full it is cut down to the
top-k, which raises the bar. Then one program a query picks the top-k of all its ranges' lists. Both find the k-th
highest score digit by digit, with histograms of whole numbers: the result does not depend on the order in which
anything runs. Since lists stay in order of position, ties go to the lower one and the result is ascending without a
sort.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels.gpu.code import e4m3_values, row_of, share_of
from foveal.kernels.gpu.device import Card, card_of
from foveal.kernels.gpu.launch import AUTO, Argument, Choice, Launch, Tiles, block_size, ceil_div
from foveal.kernels.gpu.places import places
from foveal.kernels.keys import KeySource, Queries, Rows
from foveal.kernels.records import IndexKeyRecords

# Lists are read a piece at a time.
PIECE = 1024
# Below every score.
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def ordered(score):
    """int32 that compare as float32 scores do; both zeros are equal."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_highest(scores, count, K, PIECE: tl.constexpr):
    """The K-th highest of `count` >= K ordered scores in memory, and how many equal to it belong to the top K."""
    # From here on as unsigned numbers: the sign bit turned, so that digits compare from the top.
    prefix = tl.full([], 0, tl.uint32)
    wanted = tl.full([], 0, tl.int32) + K
    digit = tl.arange(0, 256)
    i = tl.arange(0, PIECE)
    for step in range(4):
        shift = (tl.full([], 24, tl.int32) - 8 * step).to(tl.uint32)
        histogram = tl.zeros([256], tl.int32)
        for at in range(0, count, PIECE):
            number = tl.load(scores + at + i, mask=at + i < count, other=0).to(tl.uint32, bitcast=True) ^ 0x80000000
            # Of those whose higher digits are known to be right, this digit.
            rest = (number ^ prefix) >> shift
            histogram += tl.histogram((rest & 255).to(tl.int32), 256, mask=(at + i < count) & (rest < 256))
        # How many have this digit or a higher one.
        above = tl.cumsum(histogram, 0, reverse=True)
        found = tl.max(tl.where(above >= wanted, digit, 0), 0)
        wanted -= tl.sum(tl.where(digit == found + 1, above, 0), 0)
        prefix = prefix | (found.to(tl.uint32) << shift)
    return (prefix ^ 0x80000000).to(tl.int32, bitcast=True), wanted


@triton.jit
def keep_highest(scores, positions, out_scores, out_positions, count, K, PIECE: tl.constexpr):
    """Move the K highest of `count` >= K entries to the front of `out`, in their order; of equals the first. `out` may
    be the list itself. Returns the lowest score kept."""
    lowest, room = kth_highest(scores, count, K, PIECE)
    kept = 0
    ties = 0
    i = tl.arange(0, PIECE)
    for at in range(0, count, PIECE):
        inside = at + i < count
        score = tl.load(scores + at + i, mask=inside, other=0)
        position = tl.load(positions + at + i, mask=inside, other=-1)
        tied = inside & (score == lowest)
        keep = inside & ((score > lowest) | (tied & (ties + tl.cumsum(tied.to(tl.int32), 0) <= room)))
        place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        ties += tl.sum(tied.to(tl.int32), 0)
        kept += tl.sum(keep.to(tl.int32), 0)
        # Everything of this piece is read before any of it is written over.
        tl.debug_barrier()
        tl.store(out_scores + place, score, mask=keep)
        tl.store(out_positions + place, position, mask=keep)
    tl.debug_barrier()
    return lowest


@triton.jit
def index_keys(
    values, scales, row_N, seen_N, j_J, J: tl.constexpr, STRIDE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr
):
    """Index keys [N, J] of some rows as DTYPE, and their scales [N]; zeros where not `seen`."""
    mask = seen_N[:, None] & (j_J < J)[None, :]
    if KIND == "rows":
        key = tl.load(values + row_N[:, None] * STRIDE + j_J[None, :], mask=mask, other=0.0).to(DTYPE)
        scale = tl.where(seen_N, 1.0, 0.0)
    else:
        page, place = row_N // 64, row_N % 64
        bits = tl.load(values + page[:, None] * STRIDE + place[:, None] * J + j_J[None, :], mask=mask, other=0)
        if KIND == "int8":
            key = bits.to(tl.int8, bitcast=True).to(DTYPE)
        elif tl.float8e4nv == DTYPE:
            key = bits.to(tl.float8e4nv, bitcast=True)
        else:
            key, unit = e4m3_values(bits, False)
            key = key.to(DTYPE)
        scale = tl.load(scales + page * (STRIDE // 4) + 16 * J + place, mask=seen_N, other=0.0)
        if KIND == "fp8" and tl.float8e4nv != DTYPE:
            scale = scale * unit
    return key, scale


@triton.jit
def score_kernel(
    q,
    weights,
    values,
    scales,
    list_scores,
    list_positions,
    list_counts,
    queries,
    contexts,
    table,
    table_stride,
    sequences,
    HEADS,
    splits,
    K,
    capacity,
    base,
    chunk,
    J: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    Q_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """BLOCK_T queries of one sequence, of packed rows [base, base + chunk), over one range of its keys: lists of at
    most `capacity` entries, cut down to K in the end."""
    s = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    first = tl.load(queries + s)
    last = tl.minimum(tl.load(queries + s + 1), base + chunk)
    token = tl.maximum(first, base) + tl.program_id(0) * BLOCK_T
    if token >= last:
        return
    position = (tl.load(queries + sequences + 1 + s) + token - first).to(tl.int32)
    count = tl.minimum(last - token, BLOCK_T).to(tl.int32)
    start_row = tl.load(contexts + sequences + s)
    table_row = table + s * table_stride
    t = tl.arange(0, BLOCK_T)
    live_T = t < count
    m = tl.arange(0, BLOCK_T * BLOCK_I)
    head = m % BLOCK_I
    row_M = (token + m // BLOCK_I) * HEADS + head
    live_M = (m // BLOCK_I < count) & (head < HEADS)
    j = tl.arange(0, BLOCK_J)
    q_MJ = tl.load(q + row_M[:, None] * J + j[None, :], mask=live_M[:, None] & (j < J)[None, :], other=0.0)
    if Q_BITS:
        q_MJ, unit = e4m3_values(q_MJ, False)
        q_MJ = q_MJ * unit
    q_MJ = q_MJ.to(DTYPE)
    weights_M = tl.load(weights + row_M, mask=live_M, other=0.0)
    list_T = ((token - base + t) * splits + split) * capacity
    kept_T = tl.zeros([BLOCK_T], tl.int32)
    bar_T = tl.full([BLOCK_T], LOWEST, tl.int32)
    stop = position + count
    begin, end = share_of(stop, split, splits, BLOCK_N)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        seen = n < end
        row_N = row_of(n.to(tl.int64), seen, start_row, table_row, PAGED)
        k_NJ, scale_N = index_keys(values, scales, row_N, seen, j, J, STRIDE, KIND, DTYPE)
        if tl.int8 == DTYPE:
            products = tl.dot(k_NJ, tl.trans(q_MJ), out_dtype=tl.int32).to(tl.float32)
        else:
            products = tl.dot(k_NJ, tl.trans(q_MJ), input_precision="ieee")
        products = tl.maximum(products, 0.0) * weights_M[None, :]
        # Keys are the rows of products, so that a thread sums up heads by itself (and SM100 compiles it at all).
        scores_TN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for own in tl.static_range(BLOCK_T):
            own_N = tl.sum(tl.where((m // BLOCK_I == own)[None, :], products, 0.0), 1)
            scores_TN = tl.where(t[:, None] == own, own_N[None, :], scores_TN)
        number_TN = ordered(scores_TN * scale_N[None, :])
        enters = seen[None, :] & (n[None, :] <= position + t[:, None]) & live_T[:, None]
        enters = enters & (number_TN > bar_T[:, None])
        new_T = tl.sum(enters.to(tl.int32), 1)
        if tl.max(new_T, 0) > 0:
            place = list_T[:, None] + kept_T[:, None] + tl.cumsum(enters.to(tl.int32), 1) - 1
            tl.store(list_scores + place, number_TN, mask=enters)
            tl.store(list_positions + place, tl.broadcast_to(n[None, :], [BLOCK_T, BLOCK_N]), mask=enters)
            kept_T += new_T
        # In the end too: written once, because it is most of the code.
        if (tl.max(kept_T, 0) > capacity - BLOCK_N) | (at + BLOCK_N >= end):
            kept_T, bar_T = cut_lists(list_scores, list_positions, list_T, kept_T, bar_T, K, BLOCK_T, PIECE)
    tl.store(list_counts + (token - base + t) * splits + split, kept_T, mask=live_T)


@triton.jit
def cut_lists(list_scores, list_positions, list_T, kept_T, bar_T, K, BLOCK_T: tl.constexpr, PIECE: tl.constexpr):
    """Cut every list that is longer than K down to K. Returns lengths and bars: only what is higher may enter."""
    tl.debug_barrier()
    t = tl.arange(0, BLOCK_T)
    for place in range(BLOCK_T):
        count = tl.sum(tl.where(t == place, kept_T, 0), 0)
        if count >= K:
            at = tl.sum(tl.where(t == place, list_T, 0), 0)
            scores, positions = list_scores + at, list_positions + at
            lowest = keep_highest(scores, positions, scores, positions, count, K, PIECE)
            kept_T = tl.where(t == place, K, kept_T)
            bar_T = tl.where(t == place, lowest, bar_T)
    return kept_T, bar_T


@triton.jit
def merge_kernel(
    list_scores,
    list_positions,
    list_counts,
    selection,
    splits,
    K,
    capacity,
    base,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The top K of one query's lists, ascending, then -1."""
    token = tl.program_id(0).to(tl.int64)
    scores = list_scores + token * splits * capacity
    positions = list_positions + token * splits * capacity
    i = tl.arange(0, PIECE)
    # All lists to the front, one after another: where an entry goes is never after where it stands.
    total = tl.load(list_counts + token * splits)
    for split in range(1, splits):
        count = tl.load(list_counts + token * splits + split)
        for at in range(0, count, PIECE):
            inside = at + i < count
            score = tl.load(scores + split * capacity + at + i, mask=inside, other=0)
            position = tl.load(positions + split * capacity + at + i, mask=inside, other=0)
            tl.debug_barrier()
            tl.store(scores + total + at + i, score, mask=inside)
            tl.store(positions + total + at + i, position, mask=inside)
        total += count
    tl.debug_barrier()
    if total > K:
        keep_highest(scores, positions, scores, positions, total, K, PIECE)
    k = tl.arange(0, BLOCK_K)
    chosen = tl.load(positions + k, mask=k < tl.minimum(total, K), other=-1)
    tl.store(selection + (base + token) * K + k, chosen, mask=k < K)


# Bytes of the lists of one launch; queries beyond take another launch.
LIST_BYTES = 1 << 27
# A range of keys is at least so long: shorter ones would leave their work to the merge.
LEAST_RANGE = 4096


def select_top(
    q_TIJ: Tensor,
    weights_TI: Tensor,
    keys: KeySource,
    queries: Queries,
    *,
    topk: int,
    choice: Choice = AUTO,
    list_bytes: int = LIST_BYTES,
    piece: int = PIECE,
) -> tuple[tuple[Launch, ...], Tensor]:
    """Plan `select`: launches, and the selection that they fill. `choice.tiles`: queries and keys of a tile.
    list_bytes: memory of the lists; piece: entries of a list that are read at a time.

    ValueError where shapes do not fit.
    """
    tokens, heads, size = q_TIJ.shape
    device = q_TIJ.device
    card = choice.card or card_of(device)
    stored = _stored(keys, size)
    if weights_TI.shape != (tokens, heads):
        raise ValueError(f"weights have shape {tuple(weights_TI.shape)}, queries {tuple(q_TIJ.shape)}")
    where = places(queries, keys.contexts, tokens, device)
    longest, most = max(keys.contexts.lengths, default=0), max(queries.lengths, default=0)
    tiles = choice.tiles or tiles_for(heads, most)
    programs = len(queries.positions) * ceil_div(most, tiles.rows)
    splits = choice.splits or _splits(programs, longest, topk, card)
    capacity = ceil_div(2 * topk + tiles.keys, piece) * piece
    chunk = max(1, min(tokens, list_bytes // (8 * splits * capacity)))
    list_scores, list_positions = torch.empty(2, chunk, splits, capacity, dtype=torch.int32, device=device)
    list_counts = torch.zeros(chunk, splits, dtype=torch.int32, device=device)
    selection_TK = torch.empty(tokens, topk, dtype=torch.int32, device=device)
    lists: dict[str, Argument] = {
        "list_scores": list_scores,
        "list_positions": list_positions,
        "list_counts": list_counts,
        "splits": splits,
        "K": topk,
        "capacity": capacity,
    }
    dtype = _product_dtype(q_TIJ, keys, card)
    bits = q_TIJ.dtype == torch.float8_e4m3fn and dtype != tl.float8e4nv
    q_TIJ, weights_TI = q_TIJ.contiguous(), weights_TI.contiguous()
    arguments: dict[str, Argument] = {
        "q": q_TIJ.view(torch.uint8) if bits else q_TIJ,
        "weights": weights_TI,
        "HEADS": heads,
        "chunk": chunk,
        "values": stored.values,
        "scales": stored.scales,
        **lists,
        **where.arguments(),
    }
    constants = {
        "J": size,
        "STRIDE": stored.stride,
        "KIND": stored.kind,
        "Q_BITS": bits,
        "DTYPE": dtype,
        "PAGED": where.paged,
        "BLOCK_T": tiles.rows,
        "BLOCK_I": block_size(heads, 16 // tiles.rows),
        "BLOCK_J": block_size(size, 32),
        "BLOCK_N": tiles.keys,
        "PIECE": piece,
    }
    launches = []
    for base in range(0, tokens, chunk):
        grid = (ceil_div(min(most, chunk), tiles.rows), splits, len(queries.positions))
        launches.append(Launch(score_kernel, grid, {**arguments, "base": base}, constants, tiles.warps, tiles.stages))
        merge = {**lists, "selection": selection_TK, "base": base}
        sizes = {"BLOCK_K": block_size(topk), "PIECE": piece}
        launches.append(Launch(merge_kernel, (min(chunk, tokens - base),), merge, sizes, warps=4))
    return tuple(launches), selection_TK


def tiles_for(heads: int, most_queries: int) -> Tiles:
    """About 64 rows of products for a decode step, 128 where queries of a sequence can share keys (docs/gpu.md)."""
    rows = 1 if most_queries == 1 else max(1, min(8, 128 // block_size(heads)))
    return Tiles(rows, 128, 8 if rows * block_size(heads) >= 128 else 4, 3)


def _splits(programs: int, longest: int, topk: int, card: Card) -> int:
    """Ranges of keys that fill the card: two programs a multiprocessor. It depends on shapes alone."""
    wanted = ceil_div(2 * card.processors, max(1, programs))
    return max(1, min(wanted, longest // max(LEAST_RANGE, 2 * topk), 32))


@dataclass(frozen=True)
class _Stored:
    """Index keys as the kernel reads them: numbers from a row (or a page's bytes from a page) to the next."""

    values: Tensor
    scales: Tensor
    stride: int
    kind: str


def _stored(keys: KeySource, size: int) -> _Stored:
    records = keys.records
    if isinstance(records, IndexKeyRecords):
        pages, width = records.pages, PAGE_SIZE * (size + 4)
        if pages.dtype != torch.uint8 or pages.shape[1] != width:
            raise ValueError(f"pages of {width} bytes do not fit {pages.dtype} of shape {tuple(pages.shape)}")
        return _Stored(pages, pages.view(torch.float32), pages.stride(0), records.dtype)
    assert isinstance(records, Rows)
    values = records.values
    if values.shape[1] != size:
        raise ValueError(f"queries have {size} numbers, keys {values.shape[1]}")
    return _Stored(values, values, values.stride(0), "rows")


def _product_dtype(q_TIJ: Tensor, keys: KeySource, card: Card) -> tl.dtype:
    """What products are computed in: whole numbers; e4m3 where the card multiplies it, else bfloat16, which holds it
    exactly; float32 where either side is. The interpreter is wrong on products of bfloat16."""
    records = keys.records
    stored = records.values.dtype if isinstance(records, Rows) else None
    if q_TIJ.dtype == torch.int8:
        return tl.int8
    if q_TIJ.dtype == torch.float8_e4m3fn and stored is None and card.native_e4m3:
        return tl.float8e4nv
    if card.interpreted or torch.float32 in (q_TIJ.dtype, stored):
        return tl.float32
    return tl.bfloat16
