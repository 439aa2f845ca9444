"""The threads of several programs, in step: registers as rows of numbers, one a thread."""

import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from ptx.memory import Bytes, Fault, Flags, Integers, Region, SharedMemory, Visitors
from ptx.numbers import TYPES, Lanes
from ptx.parse import Operand, Program

WARP = 32
Source = Callable[["Threads"], Lanes]
Sink = Callable[["Threads", Lanes], None]
Finish = Callable[[Integers], None]


class Queue:
    """What threads have started and is done when they wait for it, by groups that they commit."""

    def __init__(self, threads: int) -> None:
        self._committed = np.zeros(threads, np.int64)
        self._started: list[tuple[Integers, Integers, Finish]] = []

    def start(self, threads: Integers, finish: Finish) -> None:
        """`finish` is told which of the threads it is to be done for."""
        self._started.append((threads, self._committed[threads], finish))

    def commit(self, active: Flags) -> None:
        """What these threads have started since they last did is a group."""
        self._committed[active] += 1

    def wait(self, active: Flags, left: int) -> None:
        """Finish all groups of these threads but the last `left`."""
        started, self._started = self._started, []
        for threads, groups, finish in started:
            ready = active[threads] & (groups < self._committed[threads] - left)
            finish(np.flatnonzero(ready))
            if not ready.all():
                rest = np.flatnonzero(~ready)
                later = partial(_finish_some, finish, rest)
                self._started.append((threads[rest], groups[rest], later))


def _finish_some(finish: Finish, of: Integers, own: Integers) -> None:
    finish(of[own])


class Threads:
    """What threads know, and which of them the current instruction is for."""

    def __init__(
        self, program: Program, places: Integers, memory: tuple[Region, ...], shared: SharedMemory, first: int
    ) -> None:
        """places: [programs, 3], where in the grid; first: the number of the first of these programs."""
        self.count, self._memory, self._shared = len(places) * program.threads, memory, shared
        thread = np.arange(self.count)
        self.program, self._warp = thread // program.threads, thread // WARP
        self._first = np.array([first, first * program.threads // WARP])
        self.epochs = np.zeros(len(places), np.int64)
        self.registers: dict[str, Lanes] = {}
        for prefix, (kind, count) in program.registers.items():
            self.registers |= {f"{prefix}{i}": np.zeros(self.count, TYPES[kind]) for i in range(count)}
        self.registers |= {f"%ctaid.{axis}": places[self.program, i].astype(np.uint32) for i, axis in enumerate("xyz")}
        self.registers["%tid.x"] = (thread % program.threads).astype(np.uint32)
        self.registers["%laneid"] = (thread % WARP).astype(np.uint32)
        self._bases = np.array([region.base for region in memory])
        self.copies, self.products = Queue(self.count), Queue(self.count)
        self.tensors: object = None
        """SM100's tensor memory (`tensor_memory.py`), once something asks for it."""
        self.active, self.stalled = np.ones(self.count, bool), np.zeros(self.count, bool)
        """`stalled`: who has to come to the current instruction again, later."""
        self.all_active = True

    def select(self, active: Flags) -> None:
        """The next instruction is for these threads."""
        self.active, self.all_active = active, bool(active.all())

    def whole_warps(self) -> None:
        """Fault where only a part of a warp is active."""
        by_warp = self.active.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise Fault("a part of a warp is missing")

    def active_warps(self) -> Integers:
        """Their numbers."""
        return np.flatnonzero(self.active.reshape(-1, WARP).any(1))

    def visitors(self, threads: Integers) -> Visitors:
        """As memory sees them."""
        programs = self.program[threads]
        first_program, first_warp = self._first
        return Visitors(self._warp[threads] + first_warp, programs + first_program, self.epochs[programs])

    def read(self, space: str, threads: Integers, addresses: Integers, size: int) -> Bytes:
        """[N, size] for some threads."""
        found = np.empty((len(threads), size), np.uint8)
        for region, own, at in self._regions(space, threads, addresses, size):
            found[own] = region.read(at, size, self.visitors(threads[own]))
        return found

    def write(self, space: str, threads: Integers, addresses: Integers, values: Bytes) -> None:
        """values: [N, size]"""
        for region, own, at in self._regions(space, threads, addresses, values.shape[1]):
            region.write(at, values[own], self.visitors(threads[own]))

    def add(self, space: str, threads: Integers, addresses: Integers, values: Lanes) -> None:
        """Atomically. values: [N, numbers]"""
        for region, own, at in self._regions(space, threads, addresses, values[0].nbytes):
            region.add(at, values[own], self.visitors(threads[own]))

    def send(self, threads: Integers, addresses: Integers, values: Bytes) -> None:
        """Copy values [N, size] to shared memory some time before their group is waited for."""
        for region, own, at in self._regions("shared", threads, addresses, values.shape[1]):
            region.promise(at, values.shape[1], self.visitors(threads[own]))
        self.copies.start(threads, lambda own: self.write("shared", threads[own], addresses[own], values[own]))

    def _regions(
        self, space: str, threads: Integers, addresses: Integers, size: int
    ) -> Iterator[tuple[Region, Integers, Integers]]:
        """Each region with which of the accesses are in it, and where."""
        if space == "shared":
            yield (
                self._shared,
                np.arange(len(addresses)),
                self._shared.of_program(self.program[threads], addresses, size),
            )
            return
        place = np.searchsorted(self._bases, addresses, "right") - 1
        if (place < 0).any():
            raise Fault(f"address {addresses.min():#x} is in no tensor")
        for number in np.unique(place):
            own = np.flatnonzero(place == number)
            yield self._memory[number], own, addresses[own]


_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def source(operand: Operand, dtype: type[np.generic]) -> Source:
    """How to read an operand as numbers of a type: [threads], or [1] if it is the same for all."""
    assert isinstance(operand, str), operand
    if not operand.startswith("%"):
        constant = _constant(operand, dtype)
        return lambda threads: constant
    size = np.dtype(dtype).itemsize

    def read(threads: Threads) -> Lanes:
        values = threads.registers[operand]
        if values.itemsize > size:
            values = values.astype(f"u{size}")
        return values.view(dtype) if values.itemsize == size else values.astype(dtype)

    return read


def spread(values: Lanes, count: int) -> Lanes:
    """[count]: a number for each thread."""
    return values if len(values) == count else np.broadcast_to(values, count)


def _constant(text: str, dtype: type[np.generic]) -> Lanes:
    if text == "global_smem":
        return np.zeros(1, dtype)
    if text[:2] in ("0f", "0d"):
        bits = np.array([int(text[2:], 16)], "u4" if text[1] == "f" else "u8")
        return bits.view(f"f{bits.itemsize}").astype(dtype) if np.dtype(dtype).kind == "f" else bits.astype(dtype)
    return np.array([int(text.rstrip("U"), 0)]).astype(dtype)


def sink(operand: Operand) -> Sink:
    """How to write numbers to a register: their bits, or more of them, extended as their type is."""
    assert isinstance(operand, str), operand

    def write(threads: Threads, values: Lanes) -> None:
        if operand == "_":
            return
        register = threads.registers[operand]
        if values.dtype.kind == "f":
            values = values.view(f"u{values.itemsize}")
        values = spread(values.astype(register.dtype, copy=False), threads.count)
        if threads.all_active:
            threads.registers[operand] = values
        else:
            threads.registers[operand] = np.where(threads.active, values, register)

    return write


def address(operand: Operand) -> Callable[[Threads, Integers], Integers]:
    """How to find the addresses of some threads."""
    match = _ADDRESS.fullmatch(operand) if isinstance(operand, str) else None
    assert match, operand
    base, offset = source(match[1], np.int64), int(match[2] or "0", 0)
    return lambda threads, chosen: spread(base(threads), threads.count)[chosen] + offset
