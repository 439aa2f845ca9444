"""The PTX machine on programs written by hand: what it computes, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from ptx.machine import run
from ptx.memory import Fault

_HEAD = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<16>;
    .loc 1 7 0 // kernel.py:7:0
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    shl.b32 %r2, %r1, 2;
"""


def launch(body: str, *tensors: Tensor, programs: int = 1, shared: int = 256) -> None:
    """Of 64 threads a program: %rd3 and %rd4 are a thread's numbers of both tensors, %r2 its place in shared memory."""
    run(f"{_HEAD}{body}\nret;\n}}", shared, (programs,), tensors)


def numbers(count: int = 64) -> tuple[Tensor, Tensor]:
    """Where from and where to."""
    return torch.randint(-1000, 1000, (count,), dtype=torch.int32), torch.zeros(count, dtype=torch.int32)


EXCHANGE = """
    ld.global.b32 %r3, [%rd3];
    st.shared.b32 [%r2], %r3;
    {barrier}
    xor.b32 %r4, %r2, {distance};
    ld.shared.b32 %r5, [%r4];
    st.global.b32 [%rd4], %r5;
"""


@pytest.mark.parametrize("distance", [4, 128])
def test_exchange_through_shared_memory(distance: int) -> None:
    """Memory of another program; a barrier that someone does not wait for."""
    given, found = numbers()
    launch(EXCHANGE.format(barrier="bar.sync 0;", distance=distance), given, found)
    assert torch.equal(found, given[torch.arange(64) ^ (distance // 4)])


def test_race_between_warps() -> None:
    """A missing barrier, which in step does not show; neighbours of one warp need none."""
    launch(EXCHANGE.format(barrier="", distance=4), *numbers())
    with pytest.raises(Fault, match=r"^kernel.py:7, ld.shared.b32: shared memory .* where nothing has been written"):
        launch(EXCHANGE.format(barrier="", distance=256), *numbers(), shared=512)
    with pytest.raises(Fault, match=r"is read where another warp has written: a race, at 128"):
        launch(EXCHANGE.format(barrier="", distance=128), *numbers())


def test_race_with_a_reader() -> None:
    """A tile that is written over while another warp still reads it."""
    body = EXCHANGE.format(barrier="bar.sync 0;", distance=128) + "{barrier} st.shared.b32 [%r2], 77;"
    launch(body.replace("{barrier}", "bar.sync 0;\n"), *numbers())
    with pytest.raises(Fault, match="is written where another warp has read: a race"):
        launch(body.replace("{barrier}", ""), *numbers())


def test_race_between_programs() -> None:
    """Programs that write different numbers to one place; adding atomically is allowed."""
    given, found = numbers()
    body = "mov.u32 %r3, %ctaid.x;\n{} [%rd4], %r3;"
    with pytest.raises(Fault, match=r"argument 1 \(256 bytes\) is written by two warps: a race"):
        launch(body.format("st.global.b32"), given, found, programs=3)
    found.zero_()
    launch(body.format("atom.global.gpu.relaxed.add.u32 %r4,"), given, found, programs=5)
    assert found.tolist() == [10] * 64
    with pytest.raises(NotImplementedError, match=r"the old value of atom.global.*add.u32"):
        launch(body.format("add.s32 %r5, %r4, 1;\natom.global.gpu.relaxed.add.u32 %r4,"), given, found)


COUNT = """
    st.shared.b32 [%r2], 0;
    {before}
    xor.b32 %r4, %r2, 128;
    atom.shared.add.u32 %r5, [%r4], 3;
    {after}
    ld.shared.b32 %r6, [%r2];
    st.global.b32 [%rd4], %r6;
"""


def test_races_with_additions() -> None:
    """A histogram that is cleared or read without a barrier between that and counting."""
    given, found = numbers()
    launch(COUNT.format(before="bar.sync 0;", after="bar.sync 0;"), given, found)
    assert found.tolist() == [3] * 64
    with pytest.raises(Fault, match="is added to where another warp has written: a race"):
        launch(COUNT.format(before="", after="bar.sync 0;"), given, found)
    with pytest.raises(Fault, match="is read where another warp has added: a race"):
        launch(COUNT.format(before="bar.sync 0;", after=""), given, found)
    with pytest.raises(Fault, match="is added to where nothing has been written"):
        launch("atom.shared.add.u32 %r5, [%r2], 3;", given, found)


def test_programs_with_odd_sizes_of_shared_memory() -> None:
    """One program's memory that begins misaligned, or that another one writes to."""
    body = "shl.b32 %r3, %r1, 4;\nst.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};"
    launch(body, *numbers(), programs=3, shared=1032)
    with pytest.raises(Fault, match="addresses 0 to 1008 of 1016 bytes of shared memory"):
        launch(body, *numbers(), programs=3, shared=1016)


@pytest.mark.parametrize("programs", [1, 300])
def test_accesses_that_a_card_refuses(programs: int) -> None:
    """One beyond the end of a tensor; four numbers at once where they are not aligned."""
    given, found = numbers()
    with pytest.raises(
        Fault, match=r"^kernel.py:7, ld.global.b32: argument 0 \(252 bytes\) is left by 4 bytes, at 252"
    ):
        launch("ld.global.b32 %r3, [%rd3];", given[:63].clone(), found, programs=programs)
    with pytest.raises(Fault, match="is misaligned for 16 bytes, at 4"):
        launch("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1+4];", given, found)
    with pytest.raises(Fault, match="of 256 bytes of shared memory"):
        launch("st.shared.b32 [%r2+4], %r1;", given, found)
    launch("setp.lt.u32 %p1, %r1, 63;\n@%p1 ld.global.b32 %r3, [%rd3];", given[:63].clone(), found)


COPY = """
    cp.async.ca.shared.global [%r2], [%rd3], 4, {count};
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r5, [%r2];
    st.global.b32 [%rd4], %r5;
"""


def test_asynchronous_copies() -> None:
    """What is read before it has arrived; zeros in place of what is not there."""
    given, found = numbers()
    launch(COPY.format(wait="cp.async.wait_group 0;", count=4), given, found)
    assert torch.equal(found, given)
    launch(COPY.format(wait="cp.async.wait_group 0;", count=0), given, found)
    assert not found.any()
    with pytest.raises(Fault, match="is read where nothing has been written"):
        launch(COPY.format(wait="cp.async.wait_group 1;", count=4), given, found)


SIGNAL = """
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    mov.b32 %r6, 0;
    setp.lt.u32 %p2, %r1, 32;
    @%p2 bra $issue;
$wait:
    {{
    .reg .pred complete;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6], 0;
    @!complete bra.uni again;
    }}
    st.global.b32 [%rd4], %r1;
    ret;
$issue:
    {commit}
    bra.uni $wait;
"""


def test_waiting_for_products() -> None:
    """Waiting for ever for those who come later in the program; or for nobody, unnoticed."""
    given, found = numbers()
    commit = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r6];"
    launch(SIGNAL.format(commit=f"@%p1 {commit}"), given, found, programs=3)
    assert found.tolist() == list(range(64))
    with pytest.raises(Fault, match="threads wait for what nobody will do"):
        launch(SIGNAL.format(commit=""), given, found)


def test_threads_that_part() -> None:
    """Loops of different lengths within a warp, whose threads meet again."""
    given, found = numbers()
    body = """
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
$loop:
    setp.ge.u32 %p1, %r3, %r1;
    @%p1 bra $after;
    add.s32 %r4, %r4, %r3;
    add.s32 %r3, %r3, 1;
    bra.uni $loop;
$after:
    shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
    st.global.b32 [%rd4], %r5;
    """
    launch(body, given, found, programs=1)
    sums = torch.arange(64) * (torch.arange(64) - 1) // 2
    assert torch.equal(found, sums[torch.arange(64) ^ 1].int())


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("div.s32 %r9, %r3, -7;", lambda x: np.trunc(x / -7)),
        ("rem.s32 %r9, %r3, 7;", lambda x: np.fmod(x, 7)),
        ("shr.s32 %r9, %r3, 40;", lambda x: np.where(x < 0, -1, 0)),
        ("bfe.s32 %r9, %r3, 2, 3;", lambda x: ((x >> 2 & 7) ^ 4) - 4),
        ("bfe.u32 %r9, %r3, 2, 3;", lambda x: x >> 2 & 7),
        ("bfe.u32 %r9, %r3, 28, 8;", lambda x: x >> 28 & 15),
        ("bfe.s32 %r9, %r3, 5, 40;", lambda x: x >> 5),
        ("bfe.s32 %r9, %r3, 5, 0;", lambda x: 0 * x),
        ("shfl.sync.bfly.b32 %r9, %r3, 33, 31, -1;", lambda x: x[np.arange(64) ^ 1]),
        ("shfl.sync.up.b32 %r9, %r3, 1, 0, -1;", lambda x: x[np.maximum(np.arange(64) - 1, np.arange(64) & 32)]),
        ("prmt.b32 %r9, %r3, 5, 0x4490;", lambda x: (x & 255) | np.where(x & 0x8000, 255, 0) << 8 | 5 << 16 | 5 << 24),
        ("max.s32 %r9, %r3, 5;", lambda x: np.maximum(x, 5)),
        ("popc.b32 %r9, %r3;", lambda x: np.bitwise_count(x.astype(np.int32).view(np.uint32))),
        (
            "cvt.rn.f32.s32 %r8, %r3;\nmul.f32 %r8, %r8, 0f3F400000;\ncvt.rzi.s32.f32 %r9, %r8;",
            lambda x: np.trunc(x * 0.75),
        ),
        ("cvt.u16.u32 %rs1, %r3;\ncvt.s32.s16 %r9, %rs1;", lambda x: x),
        ("mul.wide.s32 %rd5, %r3, 1048576;\nshr.s64 %rd6, %rd5, 18;\ncvt.u32.u64 %r9, %rd6;", lambda x: 4 * x),
        ("mov.b64 %rd5, {%r1, %r3};\nmov.b64 {_, %r9}, %rd5;", lambda x: x),
        (
            "setp.lt.s32 %p1, %r3, 0;\nsetp.gt.and.s32 %p2, %r3, -50, %p1;\nselp.b32 %r9, 1, 0, %p2;",
            lambda x: (x < 0) & (x > -50),
        ),
    ],
)
def test_arithmetic(instruction: str, expected) -> None:
    """Signs, shifts by more than a register has, what lies above the part that is used."""
    given, found = numbers()
    launch(f"ld.global.b32 %r3, [%rd3];\n{instruction}\nst.global.b32 [%rd4], %r9;", given, found)
    assert found.tolist() == expected(given.long().numpy()).astype(np.int64).tolist()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("setp.ne.f32 %p1, %r3, 0f3F800000;\nselp.f32 %r9, 0f3F800000, 0f00000000, %p1;", [1, 0, 0, 1]),
        ("setp.neu.f32 %p1, %r3, 0f3F800000;\nselp.f32 %r9, 0f3F800000, 0f00000000, %p1;", [1, 1, 0, 1]),
        ("setp.equ.f32 %p1, %r3, 0f3F800000;\nselp.f32 %r9, 0f3F800000, 0f00000000, %p1;", [0, 1, 1, 0]),
        ("setp.ltu.f32 %p1, %r3, 0f3F800000;\nselp.f32 %r9, 0f3F800000, 0f00000000, %p1;", [1, 1, 0, 1]),
        ("max.f32 %r9, %r3, 0f3F800000;", [1, 1, 1, 1]),
        ("cvt.rmi.f32.f32 %r9, %r3;", [-3, torch.nan, 1, 0]),
        ("cvt.rni.s32.f32 %r8, %r3;\ncvt.rn.f32.s32 %r9, %r8;", [-2, 0, 1, 0]),
        ("mul.f32 %r9, %r3, 0f3F800000;", [-2.5, torch.nan, 1, 1e-40]),
        ("mul.ftz.f32 %r9, %r3, 0f3F800000;", [-2.5, torch.nan, 1, 0]),
    ],
)
def test_numbers_out_of_the_ordinary(instruction: str, expected: list[float]) -> None:
    """NaN in comparisons, ordered and not; halves; numbers too small to be normal."""
    given = torch.tensor([-2.5, torch.nan, 1.0, 1e-40]).repeat(16)
    found = torch.empty(64)
    launch(f"ld.global.b32 %r3, [%rd3];\n{instruction}\nst.global.b32 [%rd4], %r9;", given, found)
    numbers_expected = torch.tensor(expected, dtype=torch.float32).repeat(16)
    torch.testing.assert_close(found, numbers_expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "instruction",
    [
        "tcgen05.shift.cta_group::1.down [%r2];",
        "max.NaN.f32 %r3, %r4, %r5;",
        "cvt.rn.sat.f32.f32 %r3, %r4;",
        "cvt.rz.bf16x2.f32 %r3, %r4, %r5;",
        "add.rn.f32.f16 %r3, %rs1, %r4;",
        "fma.rn.bf16x2 %r3, %r4, %r5, %r6;",
        "shfl.sync.bfly.b32 %r3, %r4, 1, 31, 3;",
        "redux.sync.max.abs.f32 %r3, %r4, -1;",
        "ld.local.b32 %r3, [%r4];",
        "setp.lt.and.s32 %p1, %r3, 0, !%p2;",
    ],
)
def test_an_unknown_instruction_is_named(instruction: str) -> None:
    """A kernel that is run as if an instruction, or a part of it, were not there."""
    opcode = re.escape(instruction.rstrip(";").split()[0])
    with pytest.raises(NotImplementedError, match=rf"^{opcode} \(of kernel.py:7\)"):
        launch(instruction, *numbers())
