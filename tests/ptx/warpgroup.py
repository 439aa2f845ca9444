"""Products of four warps together (wgmma, SM90): from shared memory, in their own time.

Such a product may read its matrices at any time until it is waited for. So it reads them twice, when it is started and
when it is waited for: whoever writes there in between is found out.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptx.collective import by_warp, fragment_a
from ptx.memory import Fault, Integers
from ptx.numbers import decoded
from ptx.parse import Instruction, Operand
from ptx.scalar import Step
from ptx.threads import WARP, Threads, sink, source

Rows = Callable[[], NDArray[np.float64]]
"""What some warps read, whenever it is asked: [W, rows, K]."""
_LANE = np.arange(WARP)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4
_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
"""By a descriptor's highest bits: bytes of a row."""


@dataclass(frozen=True)
class Matrix:
    """A matrix in shared memory: `rows` by 32 bytes, or, `turned`, 16 rows of halves that stand for columns."""

    rows: int
    kind: str
    turned: bool

    def addresses(self, descriptor: Integers) -> Integers:
        """[N, pieces of 16 bytes] of N descriptors ("Matrix descriptor" and "Shared memory matrix layout")."""
        start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
        assert not (descriptor >> 49 & 7).any(), "a base offset"
        (mode,) = set((descriptor >> 62 & 3).tolist())
        assert mode or not self.turned, "columns without a swizzle, where leading and stride change places"
        width = _SWIZZLES[mode]
        if self.turned:
            column, piece = np.divmod(np.arange(2 * self.rows), self.rows // 8)
            inner, outer = (column % 8) * width + piece % (width // 16) * 16, piece // (width // 16)
            at = inner + (column // 8) * stride[:, None] + outer * leading[:, None]
        else:
            row, piece = np.divmod(np.arange(2 * self.rows), 2)
            at = (row % 8) * width + (row // 8) * stride[:, None]
            at = at + piece * (leading[:, None] if width == 16 else 16)
        at = at + start[:, None]
        return at ^ ((at >> 7) & (width // 16 - 1)) << 4

    def read(self, threads: Threads, warps: Integers, descriptor: Integers) -> NDArray[np.float64]:
        """[W, rows, K] for some warps."""
        at = self.addresses(descriptor)
        whose = np.broadcast_to(warps[:, None] * WARP, at.shape)
        found = threads.read("shared", whose.ravel(), at.ravel(), 16)
        shape = (len(at), 16, self.rows) if self.turned else (len(at), self.rows, -1)
        numbers = decoded(found.view(np.uint32), self.kind).reshape(shape)
        return numbers.transpose(0, 2, 1) if self.turned else numbers


def step_of(instruction: Instruction) -> Step | None:
    """What an instruction does; None where it is none of these."""
    if instruction.name != "wgmma":
        return None
    if "mma_async" in instruction.modifiers:
        return _multiply(instruction)
    if "commit_group" in instruction.modifiers:
        return lambda threads: threads.products.commit(threads.active)
    if "wait_group" in instruction.modifiers:
        left = int(str(instruction.operands[0]))
        return lambda threads: threads.products.wait(threads.active, left)
    return lambda threads: None  # a fence


def _multiply(instruction: Instruction) -> Step:
    """A warp's rows of m64nNkK; a thread's registers of D are its pairs of columns, as in `mma`, 8 columns after 8."""
    into, a, b, adds, *signs = instruction.operands
    assert isinstance(into, tuple) and isinstance(b, str) and isinstance(adds, str)
    columns = int(re.fullmatch(r"m64n(\d+)k\d+", instruction.modifiers[3])[1])
    total_kind, kind_a, kind_b = instruction.modifiers[-3:]
    assert all(sign == "1" for sign in signs[:2]), instruction
    turned = [sign == "1" for sign in signs[2:]]
    left = _left(a, kind_a, turned[0] if len(turned) == 2 else False)
    right = _shared(b, Matrix(columns, kind_b, turned[-1] if turned else False))
    total = {"s32": np.int32, "f32": np.float32}[total_kind]
    write, read = [sink(register) for register in into], [source(register, total) for register in into]
    add = source(adds, np.bool_)

    def start(threads: Threads) -> None:
        threads.whole_warps()
        warps = threads.active_warps()
        read_a, read_b = left(threads, warps), right(threads, warps)
        before_a, before_b = read_a(), read_b()
        adding = by_warp(add(threads), threads)[warps, 0]

        def finish(own: Integers) -> None:
            if not len(own):
                return
            # Programs side by side need not wait at the same time.
            chosen = own[::WARP] // WARP
            assert len(own) == WARP * len(chosen), "a part of a warp waits"
            done, a_WMK, b_WNK = warps[chosen], read_a()[chosen], read_b()[chosen]
            for now, before in ((a_WMK, before_a[chosen]), (b_WNK, before_b[chosen])):
                if not np.array_equal(now, before, equal_nan=True):
                    raise Fault("a matrix of a product has changed before it was waited for")
            products_WMN = a_WMK @ b_WNK.transpose(0, 2, 1)
            for number, (put, get) in enumerate(zip(write, read, strict=True)):
                row, column = _GROUP + number // 2 % 2 * 8, number // 4 * 8 + 2 * _IN_GROUP + number % 2
                kept_WL = np.array(by_warp(get(threads), threads))
                found_WL = np.where(adding[chosen, None], kept_WL[done], 0) + products_WMN[:, row, column]
                kept_WL[done] = found_WL.astype(total)
                put(threads, kept_WL.ravel())

        members = (warps[:, None] * WARP + _LANE).ravel()
        threads.products.start(members, finish)

    return start


def _left(operand: Operand, kind: str, turned: bool) -> Callable[[Threads, Integers], Rows]:
    """[W, 16, K]: each warp's rows of A, from registers or from shared memory."""
    if isinstance(operand, tuple):
        registers = [source(register, np.uint32) for register in operand]

        def own_registers(threads: Threads, warps: Integers) -> Rows:
            return lambda: fragment_a([by_warp(x(threads), threads)[warps] for x in registers], kind)

        return own_registers
    whole = _shared(operand, Matrix(64, kind, turned))

    def own_rows(threads: Threads, warps: Integers) -> Rows:
        rows, read = warps[:, None] % 4 * 16 + np.arange(16), whole(threads, warps)
        return lambda: read()[np.arange(len(warps))[:, None], rows]

    return own_rows


def _shared(operand: str, matrix: Matrix) -> Callable[[Threads, Integers], Rows]:
    """[W, rows, K]: a matrix that each warp's descriptor tells of."""
    read = source(operand, np.int64)

    def numbers(threads: Threads, warps: Integers) -> Rows:
        # The registers may name the next product's matrix by the time that this one is waited for.
        descriptor = by_warp(read(threads), threads)[warps, 0]
        return lambda: matrix.read(threads, warps, descriptor)

    return numbers
