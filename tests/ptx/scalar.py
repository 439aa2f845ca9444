"""What a thread does by itself: arithmetic, comparisons, conversions, memory."""

import operator
from collections.abc import Callable
from functools import reduce

import numpy as np

from ptx.numbers import TYPES, Lanes, from_bfloat16, from_e4m3, parts, to_bfloat16, to_e4m3
from ptx.parse import Instruction, Operand, each_of
from ptx.threads import Sink, Source, Threads, address, sink, source, spread

Step = Callable[[Threads], None]


def _double(x: Lanes) -> Lanes:
    """Whole numbers of twice the width."""
    return x.astype(f"{x.dtype.kind}{2 * x.itemsize}")


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero."""
    if a.dtype.kind == "f":
        return a / b
    whole = abs(a.astype(object)) // np.maximum(abs(b.astype(object)), 1) if a.itemsize == 8 else None
    if whole is None:
        whole = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return np.where((a < 0) != (b < 0), -whole, whole).astype(a.dtype)


def _shift_left(a: Lanes, by: Lanes) -> Lanes:
    bits = 8 * a.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Lanes, by: Lanes) -> Lanes:
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def _field(a: Lanes, start: Lanes, count: Lanes) -> Lanes:
    """Bits [start, start + count), as many as there are, extended as the type is."""
    start, count = (x.astype(np.int64) & 255 for x in (start, count))
    above = np.maximum(8 * a.itemsize - start - count, 0)
    return np.where(count > 0, _shift_right(_shift_left(a, above), above + start), a.dtype.type(0))


def _permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """Four bytes of the eight of a and b; with bit 3 of a digit, its sign all over."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    bytes_ = np.concatenate((parts(a, 1), parts(b, 1)), 1)
    digits = (selector[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
    chosen = np.take_along_axis(bytes_, (digits & 7).astype(np.intp), 1)
    chosen = np.where(digits & 8, (chosen >> 7) * np.uint8(255), chosen)
    return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]


def _fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def _flushed(x: Lanes) -> Lanes:
    """Zeros in place of numbers too small to be normal."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


# By name: how to compute it from operands of the opcode's last type.
ARITHMETIC: dict[str, Callable[..., Lanes]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "min": lambda *numbers: reduce(np.fmin, numbers),
    "max": lambda *numbers: reduce(np.fmax, numbers),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "fma": _fused,
    "mad": lambda a, b, c: a * b + c,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "prmt": _permute,
}
# With NaN the first ones are false, `ne` included, and those that end in u are true.
COMPARISONS = {
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    **{
        f"{name}u": lambda a, b, opposite=opposite: ~opposite(a, b)
        for name, opposite in (("lt", operator.ge), ("le", operator.gt), ("gt", operator.le), ("ge", operator.lt))
    },
    "neu": operator.ne,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def step_of(instruction: Instruction) -> Step | None:
    """What an instruction does; None where it is none of these."""
    match instruction.name:
        case "setp":
            return _compare(instruction)
        case "selp":
            return _select(instruction)
        case "mov":
            return _move(instruction)
        case "cvt":
            return _convert(instruction)
        case "shl" | "shr" | "bfe":
            return _with_counts(instruction)
        case "ld":
            return _load(instruction)
        case "st":
            return _store(instruction)
        case "atom" | "red":
            return _atomic(instruction)
        case name if name in ARITHMETIC and instruction.modifiers[-1] == "f32x2":
            return _pairwise(instruction)
        case name if name in ARITHMETIC and instruction.modifiers[-2:] == ("f32", "bf16"):
            return _mixed(instruction)
        case name if name in ARITHMETIC and instruction.modifiers[-2:] == ("f32", "f16"):
            return None
        case name if name in ARITHMETIC:
            return _arithmetic(instruction)
    return None


def _type(instruction: Instruction) -> type[np.generic]:
    return TYPES[instruction.modifiers[-1]]


def _computation(instruction: Instruction) -> Callable[..., Lanes]:
    """By its name; with `.ftz` numbers too small to be normal are 0 before and after."""
    compute = ARITHMETIC[instruction.name]
    if "ftz" not in instruction.modifiers:
        return compute
    return lambda *numbers: _flushed(compute(*map(_flushed, numbers)))


def _arithmetic(instruction: Instruction) -> Step:
    """Also `.wide` (results of twice the width) and `.hi` (the upper half of such)."""
    compute, modifiers = _computation(instruction), instruction.modifiers
    dtype = _type(instruction)
    into, *operands = instruction.operands
    write = sink(into)
    if "wide" in modifiers:
        doubled = [*map(_doubled, operands[:2], (dtype, dtype))]
        wide = f"{np.dtype(dtype).kind}{2 * np.dtype(dtype).itemsize}"
        doubled += [source(operand, np.dtype(wide).type) for operand in operands[2:]]
        return lambda threads: write(threads, compute(*(read(threads) for read in doubled)))
    if "hi" in modifiers:
        halves = [*map(_doubled, operands, (dtype, dtype))]
        bits = 8 * np.dtype(dtype).itemsize
        assert instruction.name == "mul" and bits < 64, instruction.opcode
        return lambda threads: write(threads, (operator.mul(*(read(threads) for read in halves)) >> bits).astype(dtype))
    reads = [source(operand, dtype) for operand in operands]
    return lambda threads: write(threads, compute(*(read(threads) for read in reads)))


def _pairwise(instruction: Instruction) -> Step:
    """On two numbers a register (f32x2)."""
    compute, (into, *operands) = _computation(instruction), instruction.operands
    write, reads = sink(into), [source(operand, np.uint64) for operand in operands]

    def apply(threads: Threads) -> None:
        pairs = (parts(spread(read(threads), threads.count), 4).view(np.float32) for read in reads)
        write(threads, np.ascontiguousarray(compute(*pairs)).view(np.uint64)[:, 0])

    return apply


def _mixed(instruction: Instruction) -> Step:
    """In float32, the last operand too; the others are bfloat16 (f32.bf16)."""
    compute, (into, *narrow, last) = _computation(instruction), instruction.operands
    write, read_last = sink(into), source(last, np.float32)
    reads = [source(operand, np.uint16) for operand in narrow]
    return lambda threads: write(
        threads, compute(*(from_bfloat16(read(threads)) for read in reads), read_last(threads))
    )


def _doubled(operand: Operand, dtype: type[np.generic]) -> Callable[[Threads], Lanes]:
    read = source(operand, dtype)
    return lambda threads: _double(read(threads))


def _with_counts(instruction: Instruction) -> Step:
    """Operands after the first are 32-bit counts."""
    compute = {"shl": _shift_left, "shr": _shift_right, "bfe": _field}[instruction.name]
    into, first, *counts = instruction.operands
    write, read = sink(into), source(first, _type(instruction))
    reads = [source(operand, np.uint32) for operand in counts]
    return lambda threads: write(threads, compute(read(threads), *(count(threads) for count in reads)))


def _compare(instruction: Instruction) -> Step:
    """Maybe combined with a predicate."""
    compare = COMPARISONS[instruction.modifiers[0]]
    into, *operands = instruction.operands
    write = sink(into)
    a, b = (source(operand, _type(instruction)) for operand in operands[:2])
    if len(operands) == 2:
        return lambda threads: write(threads, compare(a(threads), b(threads)))
    combine, other = ARITHMETIC[instruction.modifiers[1]], source(operands[2], np.bool_)
    return lambda threads: write(threads, combine(compare(a(threads), b(threads)), other(threads)))


def _select(instruction: Instruction) -> Step:
    into, *operands, predicate = instruction.operands
    write, chosen = sink(into), source(predicate, np.bool_)
    a, b = (source(operand, _type(instruction)) for operand in operands)
    return lambda threads: write(threads, np.where(chosen(threads), a(threads), b(threads)))


def _move(instruction: Instruction) -> Step:
    """Also several registers into a wider one, and back."""
    into, out = instruction.operands
    dtype = _type(instruction)
    if isinstance(out, tuple):
        write, part = sink(into), np.dtype(f"u{np.dtype(dtype).itemsize // len(out)}").type
        reads = [source(operand, part) for operand in out]
        return lambda threads: write(threads, _joined(reads, threads).view(dtype)[:, 0])
    read = source(out, dtype)
    if isinstance(into, tuple):
        sinks = [sink(operand) for operand in into]
        size = np.dtype(dtype).itemsize // len(into)
        return lambda threads: _write_all(sinks, threads, parts(spread(read(threads), threads.count), size))
    write = sink(into)
    return lambda threads: write(threads, read(threads))


def _joined(reads: list[Source], threads: Threads) -> Lanes:
    """[threads, operands]"""
    return np.stack([spread(read(threads), threads.count) for read in reads], 1)


def _write_all(sinks: list[Sink], threads: Threads, values: Lanes) -> None:
    for place, write in enumerate(sinks):
        write(threads, values[:, place])


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(x: Lanes, rounding: str, dtype: type[np.generic]) -> Lanes:
    limits = np.iinfo(dtype)
    whole = np.nan_to_num(_TO_WHOLE[rounding](x.astype(np.float64)), nan=0)
    return whole.clip(limits.min, limits.max).astype(dtype)


def _convert(instruction: Instruction) -> Step:
    """Between types, or of two numbers into a packed pair (the first operand above) and back."""
    into, *operands = instruction.operands
    target, kind = instruction.modifiers[-2:]
    write = sink(into)
    pairs = {
        ("bf16x2", "f32"): lambda high, low: _pair(to_bfloat16(high), to_bfloat16(low)),
        ("f16x2", "f32"): lambda high, low: _pair(high.astype(np.float16), low.astype(np.float16)),
        ("e4m3x2", "f32"): lambda high, low: _pair(to_e4m3(high), to_e4m3(low)),
    }
    if (target, kind) in pairs:
        reads = [source(operand, np.float32) for operand in operands]
        return lambda threads: write(threads, pairs[target, kind](*_joined(reads, threads).T))
    if (target, kind) == ("f16x2", "e4m3x2"):
        read = source(operands[0], np.uint16)
        return lambda threads: write(threads, _joined_halves(from_e4m3(parts(read(threads), 1))))
    (operand,) = operands
    if kind == "bf16":
        bits = source(operand, np.uint16)
        return lambda threads: write(threads, from_bfloat16(bits(threads)).astype(TYPES[target]))
    read = source(operand, TYPES[kind])
    if target == "bf16":
        return lambda threads: write(threads, to_bfloat16(read(threads).astype(np.float32)))
    dtype = TYPES[target]
    if TYPES[kind]().dtype.kind == "f" and dtype().dtype.kind != "f":
        rounding = instruction.modifiers[0]
        return lambda threads: write(threads, _to_integer(read(threads), rounding, dtype))
    if instruction.modifiers[0] in _TO_WHOLE:
        to_whole = _TO_WHOLE[instruction.modifiers[0]]
        return lambda threads: write(threads, to_whole(read(threads)).astype(dtype))
    return lambda threads: write(threads, read(threads).astype(dtype))


def _pair(high: Lanes, low: Lanes) -> Lanes:
    pairs = np.ascontiguousarray(np.stack((low, high), 1))
    return pairs.view(f"u{2 * pairs.itemsize}")[:, 0]


def _joined_halves(values: Lanes) -> Lanes:
    return values.astype(np.float16).view(np.uint32)[:, 0]


def _space(instruction: Instruction) -> str:
    """Which memory it accesses."""
    (space,) = {"param", "global", "shared"} & set(instruction.modifiers)
    return space


def _load(instruction: Instruction) -> Step:
    into, where = instruction.operands
    space, dtype = _space(instruction), np.dtype(_type(instruction))
    sinks = [sink(operand) for operand in each_of(into)]
    if space == "param":
        assert isinstance(where, str)
        read = source("%" + where.strip("[]"), dtype.type)
        return lambda threads: sinks[0](threads, read(threads))
    find = address(where)

    def load(threads: Threads) -> None:
        chosen = np.flatnonzero(threads.active)
        found = threads.read(space, chosen, find(threads, chosen), dtype.itemsize * len(sinks))
        values = np.zeros((threads.count, len(sinks)), dtype)
        values[chosen] = np.ascontiguousarray(found).view(dtype)
        _write_all(sinks, threads, values)

    return load


def _store(instruction: Instruction) -> Step:
    where, out = instruction.operands
    space, dtype = _space(instruction), _type(instruction)
    find, reads = address(where), [source(operand, dtype) for operand in each_of(out)]

    def store(threads: Threads) -> None:
        chosen = np.flatnonzero(threads.active)
        values = _joined(reads, threads)[chosen]
        threads.write(space, chosen, find(threads, chosen), values.view(np.uint8))

    return store


def _atomic(instruction: Instruction) -> Step:
    """Additions, whose old value nobody uses."""
    *_, where, out = instruction.operands
    assert "add" in instruction.modifiers, instruction.opcode
    space, dtype = _space(instruction), _type(instruction)
    find, reads = address(where), [source(operand, dtype) for operand in each_of(out)]

    def add(threads: Threads) -> None:
        chosen = np.flatnonzero(threads.active)
        values = _joined(reads, threads)[chosen]
        threads.add(space, chosen, find(threads, chosen), values)

    return add
