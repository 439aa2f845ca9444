"""What the threads of a warp do together: exchanges, votes, and matrix products on tensor cores."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ptx.numbers import Lanes, decoded, parts
from ptx.parse import Instruction, Operand, each_of
from ptx.scalar import Step
from ptx.threads import WARP, Threads, address, sink, source, spread

_LANE = np.arange(WARP)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def step_of(instruction: Instruction) -> Step | None:
    """What an instruction does; None where it is none of these."""
    make = _MAKERS.get(instruction.name)
    if make is None:
        return None
    step = make(instruction)

    def together(threads: Threads) -> None:
        threads.whole_warps()
        step(threads)

    return together


def by_warp(values: Lanes, threads: Threads) -> Lanes:
    """[warps, 32]"""
    return spread(values, threads.count).reshape(-1, WARP)


def _shuffle(instruction: Instruction) -> Step:
    into, value, amount, clamp, members = instruction.operands
    write, read, by = sink(into), source(value, np.uint32), source(amount, np.int64)
    mode = instruction.modifiers[1]
    assert clamp == ("0" if mode == "up" else "31") and members == "-1", instruction

    def shuffle(threads: Threads) -> None:
        count = by_warp(by(threads), threads) % WARP
        lane = {"bfly": _LANE ^ count, "up": _LANE - count, "down": _LANE + count, "idx": count}[mode]
        lane = np.where((lane >= 0) & (lane < WARP), lane, _LANE)
        write(threads, np.take_along_axis(by_warp(read(threads), threads), lane, 1).ravel())

    return shuffle


def _vote(instruction: Instruction) -> Step:
    into, predicate, members = instruction.operands
    assert instruction.modifiers[1] == "ballot" and members == "-1", instruction
    write, read = sink(into), source(predicate, np.bool_)

    def vote(threads: Threads) -> None:
        bits = (by_warp(read(threads), threads).astype(np.uint64) << _LANE.astype(np.uint64)).sum(1)
        write(threads, np.repeat(bits.astype(np.uint32), WARP))

    return vote


def _reduce(instruction: Instruction) -> Step:
    into, value, _ = instruction.operands
    how, kind = instruction.modifiers[1:]
    dtype = {"s32": np.int32, "u32": np.uint32, "f32": np.float32}[kind]
    write, read = sink(into), source(value, dtype)
    reduce: Callable[..., Lanes] = {"add": np.sum, "max": np.fmax.reduce, "min": np.fmin.reduce}[how]
    return lambda threads: write(threads, np.repeat(reduce(by_warp(read(threads), threads), 1).astype(dtype), WARP))


def _matrix_rows(where: Operand, threads: Threads, matrix: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[warps * 8]: the threads that name the rows of a matrix, and the addresses."""
    naming = (threads.active_warps()[:, None] * WARP + 8 * matrix + np.arange(8)).ravel()
    return naming, address(where)(threads, naming)


def _load_matrices(instruction: Instruction) -> Step:
    """Matrices of 8 x 8 halves: a thread gets two neighbours of row (or column) `_GROUP`."""
    into, where = instruction.operands
    assert "m8n8" in instruction.modifiers and instruction.modifiers[-1] == "b16", instruction
    sinks = [sink(operand) for operand in each_of(into)]
    turned = "trans" in instruction.modifiers

    def load(threads: Threads) -> None:
        for matrix, write in enumerate(sinks):
            naming, addresses = _matrix_rows(where, threads, matrix)
            found = threads.read("shared", naming, addresses, 16).view(np.uint16).reshape(-1, 8, 8)
            if turned:
                found = found.transpose(0, 2, 1)
            pairs = np.ascontiguousarray(found[:, _GROUP[:, None], 2 * _IN_GROUP[:, None] + [0, 1]])
            values = np.zeros((threads.count // WARP, WARP), np.uint32)
            values[naming[::8] // WARP] = pairs.view(np.uint32)[..., 0]
            write(threads, values.ravel())

    return load


def _store_matrices(instruction: Instruction) -> Step:
    """The opposite."""
    where, out = instruction.operands
    assert "m8n8" in instruction.modifiers and instruction.modifiers[-1] == "b16", instruction
    reads = [source(operand, np.uint32) for operand in each_of(out)]
    turned = "trans" in instruction.modifiers

    def store(threads: Threads) -> None:
        for matrix, read in enumerate(reads):
            naming, addresses = _matrix_rows(where, threads, matrix)
            pairs = parts(by_warp(read(threads), threads)[naming[::8] // WARP].ravel(), 2)
            rows = pairs.reshape(-1, 8, 8)
            rows = rows.transpose(0, 2, 1) if turned else rows
            threads.write("shared", naming, addresses, np.ascontiguousarray(rows).reshape(-1, 8).view(np.uint8))

    return store


def _multiply(instruction: Instruction) -> Step:
    """m16n8kK: sums in float32 (or int32), products exactly.

    A thread's register r of A has row `_GROUP` + 8 (r % 2) and of K / 2 columns from r // 2 its `_IN_GROUP`th run; of B
    likewise column `_GROUP` and rows; of C rows `_GROUP` and 8 more, two columns each.
    """
    into, a, b, c = instruction.operands
    assert isinstance(into, tuple) and isinstance(a, tuple) and isinstance(b, tuple) and isinstance(c, tuple)
    size, kinds = instruction.modifiers[2], instruction.modifiers[-4:]
    assert size.startswith("m16n8k") and instruction.modifiers[3:5] == ("row", "col"), instruction
    total = {"s32": np.int32, "f32": np.float32}[kinds[0]]
    sinks = [sink(operand) for operand in into]
    reads_a, reads_b, reads_c = ([source(operand, np.uint32) for operand in registers] for registers in (a, b, c))

    def multiply(threads: Threads) -> None:
        a_WMK = fragment_a([by_warp(read(threads), threads) for read in reads_a], kinds[1])
        b_WNK = fragment_b([by_warp(read(threads), threads) for read in reads_b], kinds[2])
        c_RWL = np.stack([by_warp(read(threads), threads) for read in reads_c]).view(total)
        products_WMN = a_WMK @ b_WNK.transpose(0, 2, 1)
        rows, columns = (_GROUP, _GROUP, _GROUP + 8, _GROUP + 8), (0, 1, 0, 1)
        for write, own_WL, row, column in zip(sinks, c_RWL, rows, columns, strict=True):
            write(threads, (own_WL + products_WMN[:, row, 2 * _IN_GROUP + column]).astype(total).ravel())

    return multiply


def fragment_a(registers: list[Lanes], kind: str) -> NDArray[np.float64]:
    """[warps, 16, K] from 4 registers [warps, 32]."""
    runs = [_runs(register, kind) for register in registers]
    low, high = (np.concatenate((runs[row], runs[row + 2]), 2) for row in (0, 1))
    return np.concatenate((low, high), 1)


def fragment_b(registers: list[Lanes], kind: str) -> NDArray[np.float64]:
    """[warps, 8, K] from 2 registers [warps, 32]."""
    return np.concatenate([_runs(register, kind) for register in registers], 2)


def _runs(register: Lanes, kind: str) -> NDArray[np.float64]:
    """[warps, 8, 4 runs of numbers] of a register: the threads of a group side by side."""
    return decoded(register, kind).reshape(len(register), 8, -1)


_MAKERS = {
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "mma": _multiply,
}
