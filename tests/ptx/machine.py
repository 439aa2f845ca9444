"""Who runs when: all threads of some programs in step, those that are furthest behind first."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ptx import collective, scalar, tensor_memory, warpgroup
from ptx.memory import Fault, Flags, Region, SharedMemory
from ptx.numbers import Lanes
from ptx.parse import Instruction, Program, parse, registers_of
from ptx.scalar import Step
from ptx.threads import WARP, Threads, address, source, spread

# Threads that run in step: more cost memory, fewer time.
_TOGETHER = 1 << 13
_FLOW = ("bra", "bra.uni", "bar.sync", "ret", "exit")
# What orders accesses that happen in order here.
_NOTHING = ("fence", "membar")
# Modifiers that no step heeds.
_UNKNOWN = {"sat", "relu", "NaN", "xorsign", "cc", "rz", "rm", "rp", "rna", "rs"}


def run(ptx: str, shared_memory: int, grid: tuple[int, ...], arguments: Sequence[Tensor | float | int]) -> None:
    """Run a kernel over a grid, on CPU tensors. Fault for what a card would refuse or what is left to luck.

    shared_memory: bytes. arguments: those of its first parameters; further ones must not be read.
    """
    program = parse(ptx)
    _check_old_values(program)
    steps = [_step(instruction) for instruction in program.instructions]
    granule = min((_width(x) for x in program.instructions if x.name in ("ld", "st", "atom", "red")), default=1)
    warps = program.threads // WARP
    memory = tuple(_regions(arguments, granule, warps))
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), (*grid, 1, 1)[:3][::-1])[::-1], 1)
    together = max(1, _TOGETHER // program.threads)
    for first in range(0, len(places), together):
        part = places[first : first + together]
        shared = SharedMemory(len(part), shared_memory, granule=granule, warps=warps)
        threads = Threads(program, part, memory, shared, first)
        names = (f"%{name}" for name in program.parameters)
        threads.registers |= dict(zip(names, _bits(arguments), strict=False))
        _Run(program, steps, threads).run()


def _width(instruction: Instruction) -> int:
    """Bytes of the numbers that it moves."""
    kind = instruction.modifiers[-1]
    return 1 if kind == "pred" else int(kind.lstrip("bsuf")) // 8


def _regions(arguments: Sequence[Tensor | float | int], granule: int, warps: int) -> Iterator[Region]:
    """The memory of all tensors, by address."""
    storages = {}
    for number, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.numel():
            storages.setdefault(value.untyped_storage().data_ptr(), (value.untyped_storage(), number))
    for base, (storage, number) in sorted(storages.items()):
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        yield Region(f"argument {number}", base, data, known=True, granule=granule, warps=warps)


def _bits(arguments: Sequence[Tensor | float | int]) -> Iterator[Lanes]:
    """As parameters hold them."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield np.array([value.data_ptr()], np.uint64)
        elif isinstance(value, float):
            yield np.array([value], np.float32).view(np.uint32)
        else:
            yield np.array([value], np.int64).view(np.uint64)


def _step(instruction: Instruction) -> Step | None:
    """None for what `_Run` does itself. NotImplementedError for what the machine does not know."""
    if instruction.opcode in _FLOW:
        return None
    if instruction.name in _NOTHING:
        return lambda threads: None
    if instruction.opcode == "bar.warp.sync":
        return lambda threads: threads.whole_warps()
    unknown = f"{instruction.opcode} (of {instruction.where})"
    makers = (scalar.step_of, collective.step_of, warpgroup.step_of, tensor_memory.step_of, _copy_step)
    try:
        step = next((found for make in makers if (found := make(instruction))), None)
    except (AssertionError, LookupError, TypeError, ValueError) as error:  # a variant of what is known
        raise NotImplementedError(unknown) from error
    if step is None or _UNKNOWN & set(instruction.modifiers):
        raise NotImplementedError(unknown)
    return step


def _check_old_values(program: Program) -> None:
    """NotImplementedError where a program uses what an atomic addition returns."""
    operands = (operand for x in program.instructions for operand in (x.operands if x.stores else x.operands[1:]))
    used = {register for operand in operands for register in registers_of(operand)}
    for instruction in program.instructions:
        if instruction.name == "atom" and used & registers_of(instruction.operands[0]):
            raise NotImplementedError(f"the old value of {instruction.opcode} (of {instruction.where})")


def _copy_step(instruction: Instruction) -> Step | None:
    """Asynchronous copies from global to shared memory: they arrive when they are waited for."""
    if instruction.name != "cp":
        return None
    if "commit_group" in instruction.modifiers:
        return lambda threads: threads.copies.commit(threads.active)
    if "wait_group" in instruction.modifiers:
        left = int(str(instruction.operands[0]))
        return lambda threads: threads.copies.wait(threads.active, left)
    into, out, size, *given = instruction.operands
    bytes_ = int(str(size), 0)
    to, of = address(into), address(out)
    count = source(given[0] if given else size, np.int64)

    def copy(threads: Threads) -> None:
        chosen = np.flatnonzero(threads.active)
        some = spread(count(threads), threads.count)[chosen]
        assert np.isin(some, (0, bytes_)).all()
        values = np.zeros((len(chosen), bytes_), np.uint8)
        reading = chosen[some > 0]
        values[some > 0] = threads.read("global", reading, of(threads, reading), bytes_)
        threads.send(chosen, to(threads, chosen), values)

    return copy


class _Run:
    """Threads on their way through a program."""

    def __init__(self, program: Program, steps: Sequence[Step | None], threads: Threads) -> None:
        self._program, self._steps, self._threads = program, steps, threads
        self._at = np.zeros(threads.count, np.int64)
        # Waiting: at a barrier of all threads. Held: for something that others have to do first.
        self._done, self._waiting, self._held = (np.zeros(threads.count, bool) for _ in range(3))

    def run(self) -> None:
        """To the end."""
        with np.errstate(all="ignore"):
            while not self._done.all():
                runnable = ~(self._done | self._waiting | self._held)
                if not runnable.any():
                    self._release()
                elif self._go(runnable):
                    self._held[:] = False

    def _release(self) -> None:
        """Everyone of a program has come to a barrier."""
        held = np.isin(self._threads.program, self._threads.program[self._held])
        free = self._waiting & ~held
        if not free.any():
            raise Fault("threads wait for what nobody will do")
        self._threads.epochs[np.unique(self._threads.program[free])] += 1
        self._waiting &= ~free

    def _go(self, runnable: Flags) -> bool:
        """Those who are furthest behind, until a branch or barrier, or until they meet others. Whether they moved."""
        at = first = int(self._at[runnable].min())
        together = runnable & (self._at == at)
        stop = int(self._at[runnable & ~together].min(initial=len(self._steps)))
        while at < stop and together.any():
            instruction, step = self._program.instructions[at], self._steps[at]
            taken = together & self._guard(instruction)
            if step is None:
                self._at[together] = at + 1
                self._flow(instruction, taken)
                return True
            try:
                self._threads.select(taken)
                if taken.any():
                    step(self._threads)
            except Fault as fault:
                raise Fault(f"{instruction.where}, {instruction.opcode}: {fault}") from None
            if self._threads.stalled.any():
                self._hold(at)
                together &= ~self._held
            at += 1
        self._at[together] = at
        return at > first + 1 or bool(together.any())

    def _hold(self, at: int) -> None:
        stalled = self._threads.stalled
        self._at[stalled] = at
        self._held |= stalled
        stalled[:] = False

    def _guard(self, instruction: Instruction) -> Flags:
        guard = instruction.guard or "1"
        told = source(guard.lstrip("!"), np.bool_)(self._threads)
        return ~told if guard.startswith("!") else told

    def _flow(self, instruction: Instruction, taken: Flags) -> None:
        """A branch, a barrier, or the end."""
        if instruction.name == "bra":
            self._at[taken] = self._program.labels[str(instruction.operands[0])]
        elif instruction.name == "bar":
            assert instruction.operands == ("0",), f"a barrier of a part of the threads: {instruction}"
            self._waiting |= taken
        else:
            self._done |= taken
