"""SM100's products: started by one thread, summed in a memory of their own, waited for at a barrier in shared memory.

They read their matrices when they are started and when they are waited for, like those of `warpgroup.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ptx.memory import Fault, Integers
from ptx.numbers import decoded
from ptx.parse import Instruction, Operand
from ptx.scalar import Step
from ptx.threads import WARP, Threads, address, sink, source, spread
from ptx.warpgroup import Matrix

_LANES, _COLUMNS = 128, 512
Matrix64 = NDArray[np.float64]
_KINDS = {"f16": ("f16", "bf16"), "f8f6f4": ("e4m3",)}
"""By the kind of a product what its instruction descriptor numbers."""


@dataclass
class TensorMemory:
    """Of some programs: words [programs, 128 lanes, 512 columns], the products on their way, and barriers."""

    words: NDArray[np.uint32]
    started: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    """By program, in order."""
    phases: dict[tuple[int, int], int] = field(default_factory=dict)
    """By program and address of a barrier how often it was reached."""
    committed: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """How many products of the program are to be done before each barrier is reached, once and again."""
    done: dict[int, int] = field(default_factory=dict)
    """By program how many of them are."""

    def commit(self, program: int, at: int) -> None:
        """A barrier is reached once all that the program has started is done."""
        self.committed.setdefault((program, at), []).append(len(self.started.get(program, [])))

    def reach(self, program: int, at: int) -> None:
        """Do, in their order, what a barrier still waits for: this is the last moment."""
        count = self.committed[program, at].pop(0)
        for finish in self.started.get(program, [])[self.done.get(program, 0) : count]:
            finish()
        self.done[program] = max(count, self.done.get(program, 0))
        self.phases[program, at] += 1


def step_of(instruction: Instruction) -> Step | None:
    """What an instruction does; None where it is none of these."""
    match instruction.name, instruction.modifiers[:1]:
        case "elect", _:
            return _elect(instruction)
        case "mbarrier", ("init",) | ("inval",):
            return _set_barrier(instruction)
        case "mbarrier", ("try_wait",):
            return _wait(instruction)
        case "tcgen05", ("alloc",):
            return _allocate(instruction)
        case "tcgen05", ("dealloc",) | ("relinquish_alloc_permit",) | ("wait",):
            return lambda threads: threads.whole_warps()
        case "tcgen05", ("commit",):
            return _commit(instruction)
        case "tcgen05", ("ld",) | ("st",):
            return _move(instruction)
        case "tcgen05", ("mma",):
            return _multiply(instruction)
    return None


def _memory(threads: Threads) -> TensorMemory:
    if threads.tensors is None:
        threads.tensors = TensorMemory(np.zeros((len(threads.epochs), _LANES, _COLUMNS), np.uint32))
    assert isinstance(threads.tensors, TensorMemory)
    return threads.tensors


def _elect(instruction: Instruction) -> Step:
    """The first thread of each warp."""
    both, _ = instruction.operands
    assert isinstance(both, str)
    leader, elected = map(sink, both.split("|"))

    def elect(threads: Threads) -> None:
        threads.whole_warps()
        leader(threads, np.zeros(1, np.uint32))
        elected(threads, np.arange(threads.count) % WARP == 0)

    return elect


def _places(where: Operand) -> Callable[[Threads], list[tuple[int, int]]]:
    """The program and address of each active thread."""
    find = address(where)

    def places(threads: Threads) -> list[tuple[int, int]]:
        chosen = np.flatnonzero(threads.active)
        return list(zip(threads.program[chosen].tolist(), find(threads, chosen).tolist(), strict=True))

    return places


def _set_barrier(instruction: Instruction) -> Step:
    """Make it, for one arrival, or end it."""
    places = _places(instruction.operands[0])
    made = "init" in instruction.modifiers
    assert not made or instruction.operands[1] == "1", instruction

    def set_(threads: Threads) -> None:
        for place in places(threads):
            if made:
                _memory(threads).phases[place] = 0
            else:
                del _memory(threads).phases[place]

    return set_


def _commit(instruction: Instruction) -> Step:
    """A barrier is reached once all that was started before is done."""
    places = _places(instruction.operands[0])

    def commit(threads: Threads) -> None:
        memory = _memory(threads)
        for program, at in places(threads):
            memory.commit(program, at)

    return commit


def _wait(instruction: Instruction) -> Step:
    """Everything that a barrier waits for is done now: the last moment."""
    into, where, parity = instruction.operands
    write, places, read = sink(into), _places(where), source(parity, np.int64)

    def wait(threads: Threads) -> None:
        memory, chosen = _memory(threads), np.flatnonzero(threads.active)
        wanted = spread(read(threads), threads.count)[chosen]
        done = np.zeros(threads.count, bool)
        for thread, place, old in zip(chosen, places(threads), wanted, strict=True):
            if place not in memory.phases:
                raise Fault("someone waits at a barrier that is none")
            while memory.phases[place] % 2 == old and memory.committed.get(place):
                memory.reach(*place)
            done[thread] = memory.phases[place] % 2 != old
        threads.stalled = threads.active & ~done
        write(threads, done)

    return wait


def _allocate(instruction: Instruction) -> Step:
    """All columns, from the first: a kernel asks once."""
    find = address(instruction.operands[0])

    def allocate(threads: Threads) -> None:
        first = np.flatnonzero(threads.active)[::WARP]
        threads.write("shared", first, find(threads, first), np.zeros((len(first), 4), np.uint8))

    return allocate


def _move(instruction: Instruction) -> Step:
    """Columns between registers and each thread's lane, or (16x32bx2) 16 lanes' columns and then further ones."""
    loads, shape = instruction.modifiers[0] == "ld", instruction.modifiers[3]
    operands = instruction.operands
    where, registers = (operands[1], operands[0]) if loads else (operands[0], operands[-1])
    assert isinstance(registers, tuple) and shape in ("32x32b", "16x32bx2"), instruction
    further = 0 if shape == "32x32b" else int(str(operands[2] if loads else operands[1]))
    find = address(where)
    sinks, reads = [sink(x) for x in registers], [source(x, np.uint32) for x in registers]

    def move(threads: Threads) -> None:
        threads.whole_warps()
        chosen = np.flatnonzero(threads.active)
        at = find(threads, chosen)
        lane, column = (at >> 16) + chosen % WARP, at & 0xFFFF
        if (at >> 21 != chosen // WARP % 4).any():
            raise Fault("a warp leaves its lanes of tensor memory")
        if shape == "16x32bx2":
            second = chosen % WARP >= 16
            lane, column = lane - 16 * second, column + further * second
        words, program = _memory(threads).words, threads.program[chosen]
        for number, (write, read) in enumerate(zip(sinks, reads, strict=True)):
            if loads:
                values = np.zeros(threads.count, np.uint32)
                values[chosen] = words[program, lane, column + number]
                write(threads, values)
            else:
                words[program, lane, column + number] = spread(read(threads), threads.count)[chosen]

    return move


@dataclass(frozen=True)
class _Shape:
    """What an instruction descriptor says ("Instruction descriptor" of tcgen05)."""

    rows: int
    columns: int
    kinds: tuple[str, str]
    turned: tuple[bool, bool]

    @classmethod
    def of(cls, descriptor: int, kind: str) -> "_Shape":
        """ValueError for what is not summed in float32, or negated."""
        fields = [descriptor >> bit & 7 for bit in (7, 10)]
        if descriptor >> 4 & 3 != 1 or descriptor >> 13 & 3:
            raise ValueError(f"instruction descriptor {descriptor:#x}")
        turned = bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)
        left, right = (_KINDS[kind][number] for number in fields)
        return cls((descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3, (left, right), turned)

    def lanes(self, first: int) -> Integers:
        """Of the rows: all 128, or 16 of each warp's."""
        row = np.arange(self.rows)
        return first + (row if self.rows == _LANES else row // 16 * 32 + row % 16)


@dataclass(frozen=True)
class _Product:
    """D (+)= A B of one program, once it is started."""

    memory: TensorMemory
    program: int
    shape: _Shape
    place: int
    """Of D, in tensor memory."""
    adds: bool
    operands: Callable[[], tuple[Matrix64, Matrix64]]
    """Reads A [M, K] and B [N, K]."""

    def start(self) -> None:
        """Read the matrices, and once more when the product is to be done."""
        before = self.operands()
        self.memory.started.setdefault(self.program, []).append(lambda: self._finish(before))

    def _finish(self, before: tuple[Matrix64, Matrix64]) -> None:
        a_MK, b_NK = self.operands()
        for which, now, old in zip("AB", (a_MK, b_NK), before, strict=True):
            if not np.array_equal(now, old, equal_nan=True):
                raise Fault(f"{which} of a product has changed before it was waited for")
        sums = self.memory.words.view(np.float32)[self.program]
        place = np.ix_(self.shape.lanes(self.place >> 16), (self.place & 0xFFFF) + np.arange(self.shape.columns))
        sums[place] = a_MK @ b_NK.T + (sums[place] if self.adds else 0)


def _multiply(instruction: Instruction) -> Step:
    """By one thread of each program; A from either memory."""
    into, a, b, descriptor, adds = instruction.operands
    assert isinstance(a, str) and isinstance(b, str)
    kind, in_tensors = instruction.modifiers[-1], a.startswith("[")
    assert kind in _KINDS, instruction
    find_d, find_a, find_b = address(into), address(a if in_tensors else f"[{a}]"), address(f"[{b}]")
    read_shape, read_adds = source(descriptor, np.int64), source(adds, np.bool_)

    def start(threads: Threads) -> None:
        memory, chosen = _memory(threads), np.flatnonzero(threads.active)
        places = zip(*(find(threads, chosen) for find in (find_d, find_a, find_b)), strict=True)
        shapes, adding = (spread(read(threads), threads.count)[chosen] for read in (read_shape, read_adds))
        for thread, (d_at, a_at, b_at), fields, add in zip(chosen, places, shapes, adding, strict=True):
            program, shape = int(threads.program[thread]), _Shape.of(int(fields), kind)
            left = partial(_tensor_rows, memory.words[program], int(a_at), shape)
            if not in_tensors:
                left = partial(_shared_rows, threads, thread, a_at, Matrix(shape.rows, shape.kinds[0], shape.turned[0]))
            right = partial(_shared_rows, threads, thread, b_at, Matrix(shape.columns, shape.kinds[1], shape.turned[1]))
            _Product(memory, program, shape, int(d_at), bool(add), partial(_both, left, right)).start()

    return start


def _both(left: Callable[[], Matrix64], right: Callable[[], Matrix64]) -> tuple[Matrix64, Matrix64]:
    return left(), right()


def _tensor_rows(words: NDArray[np.uint32], at: int, shape: _Shape) -> Matrix64:
    """[M, K] from 8 columns of tensor memory."""
    columns = (at & 0xFFFF) + np.arange(8)
    return decoded(words[np.ix_(shape.lanes(at >> 16), columns)], shape.kinds[0]).reshape(shape.rows, -1)


def _shared_rows(threads: Threads, thread: int, descriptor: int, matrix: Matrix) -> Matrix64:
    """[rows, K] from shared memory, as read by a thread's warp."""
    return matrix.read(threads, np.array([thread // WARP]), np.array([descriptor]))[0]
