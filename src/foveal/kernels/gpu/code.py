"""Device functions that several kernels share: rows and selections, e4m3 by its bits, products, running softmax."""

import triton
import triton.language as tl

PAGE_SIZE = tl.constexpr(64)
LATENT_BLOCK = tl.constexpr(128)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_of(position, seen, start, table_row, PAGED: tl.constexpr):
    """int64 rows of positions of one sequence; only of those that are `seen` is the page table read."""
    if PAGED:
        page = tl.load(table_row + position // PAGE_SIZE, mask=seen, other=0)
        return page * PAGE_SIZE + position % PAGE_SIZE
    return start + position


@triton.jit
def block_places(at, end, start, table_row, PAGED: tl.constexpr, BLOCK: tl.constexpr):
    """Pages and places in them of positions [at, at + BLOCK), which lie within one page of 64: one load for all."""
    n = tl.arange(0, BLOCK)
    if PAGED:
        # `at` is no tensor, and the interpreter cannot divide it by a constexpr.
        page = tl.load(table_row + at // 64, mask=at < end, other=0)
        place_N = at % 64 + n
    else:
        page = (start + at + n) // PAGE_SIZE
        place_N = (start + at + n) % PAGE_SIZE
    return page, place_N


@triton.jit
def e4m3_values(bits, NATIVE: tl.constexpr):
    """float32 of e4m3 bytes (uint8) in some unit, exactly, and the unit, for a factor that is there anyway.

    By the card's own conversion where it has one, else by moving the bits into a float16.
    """
    if NATIVE:
        values = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        wide = bits.to(tl.int16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        values = half.to(tl.float16, bitcast=True).to(tl.float32)
    return values, 1.0 if NATIVE else 256.0


@triton.jit
def encode_e4m3(x):
    """e4m3 bytes (uint8) of float32 numbers within +-448, to the nearest, ties to even.

    In integers, because cards before SM89 cannot, and the interpreter loses carries.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Below 2^-6 the step is 2^-9, which is that of float32 at 2^14: adding it rounds, ties to even.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    return (sign | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def bfloat16_bits(x):
    """The bits (int16) of float32 numbers as bfloat16, to the nearest, ties to even (the interpreter truncates)."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def power_of_two_scale(amax):
    """The smallest power of two s with max(amax, 1e-4) / s <= 448, from the bits: 448 is 1.75 * 2^8."""
    bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
    above = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return (((bits >> 23) - 8 + above) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(scale):
    """1 / scale, exactly, of normal powers of two."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def softmax_step(scores_MN, most_M, total_M):
    """One step of a running softmax to base 2 over masked scores (-inf): weights, the factor of what was summed before,
    and the maximum and total brought up to date."""
    new_M = tl.maximum(most_M, tl.max(scores_MN, 1))
    finite_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    weights_MN = tl.exp2(scores_MN - finite_M[:, None])
    fade_M = tl.exp2(most_M - finite_M)
    return weights_MN, fade_M, new_M, total_M * fade_M + tl.sum(weights_MN, 1)


@triton.jit
def share_of(length, split, splits, BLOCK: tl.constexpr):
    """First and last (exclusive) of the keys of one split of `length` keys, cut at whole blocks."""
    chunk = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    begin = split * chunk
    return begin, tl.minimum(begin + chunk, length)


@triton.jit
def entries_of(selection, K):
    """How many entries of one query's selection count: those up to the last that is a position."""
    BLOCK: tl.constexpr = 1024
    k = tl.arange(0, BLOCK)
    last = 0
    for start in range(0, K, BLOCK):
        entry = tl.load(selection + start + k, mask=start + k < K, other=-1)
        last = tl.maximum(last, tl.max(tl.where(entry >= 0, start + k + 1, 0), 0))
    return last


@triton.jit
def chosen_rows(rows, at, K, BLOCK: tl.constexpr):
    """A block of one query's selected rows (-1 = none), and which of them are there."""
    n = at + tl.arange(0, BLOCK)
    row = tl.load(rows + n, mask=n < K, other=-1)
    return row, row >= 0


@triton.jit
def product(q, k, at_M, at_N, live_M, seen_N, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """q.k of a tile of rows, float32 [M, N], a stretch of P at a time."""
    sum_MN = tl.zeros([at_M.shape[0], at_N.shape[0]], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        q_MP = tl.load(q + at_M[:, None] + p[None, :], mask=live_M[:, None] & (p < P)[None, :], other=0.0)
        k_NP = tl.load(k + at_N[:, None] + p[None, :], mask=seen_N[:, None] & (p < P)[None, :], other=0.0)
        sum_MN = tl.dot(q_MP, tl.trans(k_NP), sum_MN, input_precision="ieee")
    return sum_MN
