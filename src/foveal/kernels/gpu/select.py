"""Score and select: index scores and their exact top-k in one stream, without a buffer of scores.

A program scores blocks of keys for a few queries over one range of the context and appends what beats the lowest
score kept so far to a small list of (score, position), in order of position. When a list is nearly full it is cut down
to the top-k, which raises the bar. Then one program a query picks the top-k of all its ranges' lists. Both find the
k-th highest score digit by digit, with histograms of whole numbers: the result does not depend on the order in which
anything runs. Since lists stay in order of position, ties go to the lower one and the result is ascending without a
sort.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels.gpu.code import block_places, e4m3_values, share_of
from foveal.kernels.gpu.device import Card, card_of
from foveal.kernels.gpu.launch import AUTO, Argument, Choice, Launch, Tiles, block_size, ceil_div
from foveal.kernels.gpu.places import places
from foveal.kernels.keys import KeySource, Queries, Rows
from foveal.kernels.records import IndexKeyRecords

# Lists are read a piece at a time.
PIECE = 1024
# Below every score.
LOWEST = tl.constexpr(-(2**31))
# A list without room for so many more blocks of keys is cut.
ROUND = tl.constexpr(8)


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
def load_keys(
    values,
    scales,
    at,
    end,
    start_row,
    table_row,
    J: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Index keys [N, J] at positions [at, at + BLOCK_N) as they are stored, and their scales [N]; zeros from `end` on,
    whatever is stored there."""
    j = tl.arange(0, BLOCK_J)
    seen_N = at + tl.arange(0, BLOCK_N) < end
    mask = seen_N[:, None] & (j < J)[None, :]
    page, place_N = block_places(at, end, start_row, table_row, PAGED, BLOCK_N)
    if KIND == "rows":
        at_N = (page * 64 + place_N) * STRIDE
        scale_N = tl.where(seen_N, 1.0, 0.0)
    else:
        at_N = page * STRIDE + place_N * J
        scale_N = tl.load(scales + page * (STRIDE // 4) + 16 * J + place_N, mask=seen_N, other=0.0)
    return tl.load(values + at_N[:, None] + j[None, :], mask=mask, other=0), scale_N


@triton.jit
def index_keys(stored_NJ, scale_N, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Stored index keys as DTYPE, and their scales."""
    if KIND == "int8":
        stored_NJ = stored_NJ.to(tl.int8, bitcast=True)
    elif KIND == "fp8":
        if tl.float8e4nv == DTYPE:
            stored_NJ = stored_NJ.to(tl.float8e4nv, bitcast=True)
        else:
            stored_NJ, unit = e4m3_values(stored_NJ, False)
            scale_N = scale_N * unit
    return stored_NJ.to(DTYPE), scale_N


@triton.jit
def block_scores(q_MJ, weights_M, stored_NJ, scale_N, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Ordered scores [N, T] of a block of stored keys."""
    k_NJ, scale_N = index_keys(stored_NJ, scale_N, KIND, DTYPE)
    # Keys are the rows of products, so that a thread sums up heads by itself.
    if tl.int8 == DTYPE:
        products = tl.dot(k_NJ, tl.trans(q_MJ), out_dtype=tl.int32).to(tl.float32)
    else:
        products = tl.dot(k_NJ, tl.trans(q_MJ), input_precision="ieee")
    products = tl.maximum(products, 0.0) * weights_M[None, :]
    scores_NT = tl.sum(tl.reshape(products, [k_NJ.shape[0], BLOCK_T, q_MJ.shape[0] // BLOCK_T]), 2)
    return ordered(scores_NT * scale_N[:, None])


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
    DTYPE: tl.constexpr,
    PAGED: tl.constexpr,
    AHEAD: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """BLOCK_T queries of one sequence, of packed rows [base, base + chunk), over one range of its keys: lists of at
    most `capacity` entries, the K highest among them.

    AHEAD: as in `latent_kernel`. APART: scores are computed in a branch (that is always taken), without which the
    compiler fails for SM100: it follows products to the last reduction that they reach. It does not load ahead then.
    """
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
    q_MJ = q_MJ.to(DTYPE)
    weights_M = tl.load(weights + row_M, mask=live_M, other=0.0)
    list_T = ((token - base + t) * splits + split) * capacity
    kept_T = tl.zeros([BLOCK_T], tl.int32)
    bar_T = tl.full([BLOCK_T], LOWEST, tl.int32)
    stop = position + count
    begin, end = share_of(stop, split, splits, BLOCK_N)
    at = begin
    while at < end:
        # So many blocks fit into every list, whatever enters: a loop without cuts, whose keys the compiler loads ahead.
        room = (capacity - tl.max(kept_T, 0)) // BLOCK_N * BLOCK_N
        until = tl.minimum(end, at + room)
        if AHEAD:
            stored, stored_N = load_keys(
                values, scales, at, end, start_row, table_row, J, STRIDE, KIND, PAGED, BLOCK_N, BLOCK_J
            )
        for first_n in range(at, until, BLOCK_N):
            n = first_n + tl.arange(0, BLOCK_N)
            seen = n < end
            if not AHEAD:
                stored, stored_N = load_keys(
                    values, scales, first_n, end, start_row, table_row, J, STRIDE, KIND, PAGED, BLOCK_N, BLOCK_J
                )
            if APART:
                number_NT = tl.full([BLOCK_N, BLOCK_T], LOWEST, tl.int32)
                if first_n < end:
                    number_NT = block_scores(q_MJ, weights_M, stored, stored_N, KIND, DTYPE, BLOCK_T)
            else:
                number_NT = block_scores(q_MJ, weights_M, stored, stored_N, KIND, DTYPE, BLOCK_T)
            if AHEAD:
                following = first_n + BLOCK_N
                stored, stored_N = load_keys(
                    values, scales, following, end, start_row, table_row, J, STRIDE, KIND, PAGED, BLOCK_N, BLOCK_J
                )
            enters = seen[:, None] & (n[:, None] <= position + t[None, :]) & live_T[None, :]
            enters = (enters & (number_NT > bar_T[None, :])).to(tl.int32)
            if tl.max(tl.max(enters, 1), 0) > 0:
                place = list_T[None, :] + kept_T[None, :] + tl.cumsum(enters, 0) - 1
                tl.store(list_scores + place, number_NT, mask=enters > 0)
                tl.store(list_positions + place, tl.broadcast_to(n[:, None], [BLOCK_N, BLOCK_T]), mask=enters > 0)
                kept_T += tl.sum(enters, 0)
        at = until
        if (at < end) & (tl.max(kept_T, 0) > capacity - ROUND * BLOCK_N):
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
    dtype = _product_dtype(q_TIJ, keys, card)
    tiles = choice.tiles or tiles_for(card, heads, most, stored.kind == "fp8" and dtype != tl.float8e4nv)
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
    if q_TIJ.dtype == torch.float8_e4m3fn and dtype != tl.float8e4nv:
        q_TIJ = q_TIJ.to(torch.bfloat16 if dtype == tl.bfloat16 else torch.float32)
    q_TIJ, weights_TI = q_TIJ.contiguous(), weights_TI.contiguous()
    arguments: dict[str, Argument] = {
        "q": q_TIJ,
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
        "DTYPE": dtype,
        "PAGED": where.paged,
        "AHEAD": tiles.stages == 1,
        "APART": _apart(card),
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
        sizes = {"BLOCK_K": block_size(topk), "PIECE": 2 * piece}
        launches.append(Launch(merge_kernel, (min(chunk, tokens - base),), merge, sizes, warps=8))
    return tuple(launches), selection_TK


def tiles_for(card: Card, heads: int, most_queries: int, decodes: bool) -> Tiles:
    """A page of keys and one query of a decode step, or as many as fill a product where queries of a sequence share
    keys: several programs a multiprocessor (docs/gpu.md).

    decodes: e4m3 that the card does not multiply. One stage: see AHEAD in `score_kernel`.
    """
    columns = 256 if card.reads_shared else 128
    rows = 1 if most_queries == 1 else max(1, min(8, columns // block_size(heads)))
    ahead = decodes or _apart(card)
    return Tiles(rows, PAGE_SIZE, 4, 1 if ahead else 3 if rows == 1 else 2)


def _apart(card: Card) -> bool:
    return card.capability // 10 == 10


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
