"""The compiled recurrences against the naive loops in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import ISAS, each_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import make_queries
from torch import Tensor
from torch.nn.functional import normalize

from foveal.kernels import Queries, causal_conv, delta_rule, linear_attention, selective_scan, ssd

Inputs = list[Tensor | None]
LENGTHS = [[1], [0, 1, 3, 0, 1], [5, 0, 1, 9], [40, 7]]
# (heads, heads that share a group, keys or states, values or channels): less than a register, remainders everywhere,
# several blocks of one head, whole registers.
SIZES = [(1, 1, 1, 1), (3, 1, 5, 11), (4, 2, 16, 70), (2, 2, 64, 32), (2, 1, 7, 33)]


def scan_inputs(tokens: int, sequences: int, sizes: tuple[int, ...]) -> Inputs:
    heads, _, states, values = sizes
    channels = heads * values
    u, dt, b, c = (torch.randn(tokens, n) for n in (channels, channels, states, states))
    return [u, dt.abs(), -3 * torch.rand(channels, states), b, c, torch.randn(sequences, channels, states)]


def ssd_inputs(tokens: int, sequences: int, sizes: tuple[int, ...]) -> Inputs:
    heads, shared, states, channels = sizes
    x, dt = torch.randn(tokens, heads, channels), torch.rand(tokens, heads)
    b, c = (torch.randn(tokens, heads // shared, states) for _ in "bc")
    return [x, dt, -3 * torch.rand(heads), b, c, torch.randn(sequences, heads, channels, states)]


def attention_inputs(tokens: int, sequences: int, sizes: tuple[int, ...], by_key: bool = True) -> Inputs:
    heads, shared, keys, values = sizes
    q, k = (torch.randn(tokens, heads // shared, keys) for _ in "qk")
    decay = -2 * torch.rand(tokens, heads, keys if by_key else 1)
    v, state = torch.randn(tokens, heads, values), torch.randn(sequences, heads, keys, values)
    return [q, normalize(k, dim=-1), v, decay, state]


def delta_inputs(tokens: int, sequences: int, sizes: tuple[int, ...], by_key: bool = True) -> Inputs:
    *inputs, state = attention_inputs(tokens, sequences, sizes, by_key)
    return [*inputs, torch.rand(tokens, sizes[0]), state]


def conv_inputs(tokens: int, sequences: int, sizes: tuple[int, ...]) -> Inputs:
    heads, shared, taps, values = sizes
    taps, channels = min(taps, 6), heads * values
    bias = torch.randn(channels) if shared == 1 else None
    return [
        torch.randn(tokens, channels),
        torch.randn(channels, taps),
        bias,
        torch.randn(sequences, taps - 1, channels),
    ]


CASES: dict[str, tuple[Any, Callable[..., Inputs]]] = {
    "selective scan": (selective_scan, scan_inputs),
    "ssd": (ssd, ssd_inputs),
    "linear attention": (linear_attention, attention_inputs),
    "decay by head": (linear_attention, lambda *sizes: attention_inputs(*sizes, by_key=False)),
    "gated delta rule": (delta_rule, lambda *sizes: delta_inputs(*sizes, by_key=False)),
    "kimi delta attention": (delta_rule, delta_inputs),
    "convolution": (causal_conv, conv_inputs),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are not written are NaN."""
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype=None: torch.full(*shape, torch.nan, dtype=dtype))


def check(operation: Any, inputs: Inputs, lengths: list[int], isa: str, tolerance: float = 4e-6) -> None:
    """One call beside the reference; results far below their inputs, which are about 1, are what cancellation left."""
    queries = make_queries(lengths, lengths)
    found = operation(*inputs, queries, version=isa)
    expected = operation(*(None if x is None else x.double() for x in inputs), queries, version="reference")
    for result, wanted in zip(found, expected, strict=True):
        assert result.shape == wanted.shape
        assert (result.double() - wanted).norm() <= tolerance * max(wanted.norm(), 1.0)


@pytest.mark.parametrize("name", CASES)
def test_under_another_default_dtype(name: str) -> None:
    """Results that are made for two bytes a number and written with four."""
    operation, make = CASES[name]
    inputs = make(5, 2, SIZES[0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        results = operation(*inputs, make_queries([2, 3], [2, 3]), version=ISAS[-1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(result.dtype == torch.float32 for result in results)
    check(operation, inputs, [2, 3], ISAS[-1])


@each_isa
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_recurrences(isa: str, name: str, sizes: tuple[int, ...], lengths: list[int]) -> None:
    """Lanes, channels or heads that are left out; states of another sequence; a first or last token that is special."""
    operation, make = CASES[name]
    check(operation, make(sum(lengths), len(lengths), sizes), lengths, isa)


@each_isa
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_call(isa: str, data: st.DataObject) -> None:
    """Whatever the cases above leave out."""
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
    groups, shared, states, values = (data.draw(st.integers(1, most)) for most in (3, 3, 40, 80))
    operation, make = CASES[data.draw(st.sampled_from(list(CASES)))]
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    check(operation, make(sum(lengths), len(lengths), (groups * shared, shared, states, values)), lengths, isa)


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_strides(isa: str, name: str) -> None:
    """What a token has being looked for where the token before it ends: inputs are slices of wider projections."""
    operation, make = CASES[name]
    inputs = make(9, 2, (4, 2, 8, 24))
    queries = make_queries([3, 6], [3, 6])
    expected = operation(*inputs, queries, version=isa)
    for dim in (1, -1):
        wide = [x if x is None or len(x) != 9 else torch.cat((x, x), dim).narrow(dim, 0, x.shape[dim]) for x in inputs]
        for found, wanted in zip(operation(*wide, queries, version=isa), expected, strict=True):
            assert torch.equal(found, wanted)


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_threads_and_company_change_nothing(isa: str, name: str) -> None:
    """Results that depend on the threads or on the other sequences; two threads that share memory."""
    operation, make = CASES[name]
    lengths = [60, 1, 80]
    inputs = make(sum(lengths), len(lengths), (6, 2, 16, 48))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(operation(*inputs, make_queries(lengths, lengths), version=isa))
    finally:
        torch.set_num_threads(before)
    alone = [x[61:] if x is not None and len(x) == 141 else x for x in inputs[:-1]]
    state = inputs[-1]
    assert state is not None
    out, last = operation(*alone, state[2:], make_queries([80], [80]), version=isa)
    for result, one in zip(results[1], results[0], strict=True):
        assert torch.equal(result, one)
    assert torch.equal(out, results[0][0][61:]) and torch.equal(last[0], results[0][1][2])


@each_isa
@pytest.mark.parametrize("name", [name for name in CASES if name != "convolution"])
def test_strong_decays(isa: str, name: str) -> None:
    """Decays that underflow to anything but zero, or turn what was there before into NaN."""
    operation, make = CASES[name]
    inputs = make(50, 1, (2, 1, 16, 24))
    strong = inputs[1 if operation in (selective_scan, ssd) else 3]
    assert strong is not None
    strong[::7] *= 300
    if operation in (linear_attention, delta_rule):
        strong[3] = -torch.inf
    check(operation, inputs, [50], isa)


@each_isa
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_in_bfloat16(isa: str, bias: bool) -> None:
    """Sums that are rounded before their end; weights of another channel."""
    x, weight, state = torch.randn(13, 300), torch.randn(300, 4), torch.randn(2, 3, 300)
    inputs: Inputs = [x, weight, torch.randn(300) if bias else None, state]
    rounded: Inputs = [None if part is None else part.bfloat16() for part in inputs]
    check(causal_conv, rounded, [2, 11], isa, tolerance=3e-3)
    assert causal_conv(*rounded, make_queries([2, 11], [2, 11]), version=isa)[0].dtype == torch.bfloat16  # type: ignore[arg-type]


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_bad_arguments_are_refused(isa: str, name: str) -> None:
    """Reading or writing past the end of a tensor."""
    operation, make = CASES[name]
    inputs = make(6, 2, (4, 2, 8, 24))
    operation(*inputs, Queries((0, 2, 6), (0, 0)), version=isa)
    for offsets in ((0, 2, 7), (1, 2, 6), (0, 7, 6), (0, 2, 5)):
        with pytest.raises(ValueError, match="do not ascend from 0 to the 6 tokens"):
            operation(*inputs, Queries(offsets, (0, 0)), version=isa)
    with pytest.raises(ValueError, match="has shape"):
        operation(*inputs, Queries((0, 2, 4, 6), (0, 0, 0)), version=isa)
    for place, x in enumerate(inputs):
        if x is None or place == 0:
            continue
        short = [*inputs[:place], x[..., :-1], *inputs[place + 1 :]]
        with pytest.raises(ValueError, match=r"has shape|cannot share"):
            operation(*short, Queries((0, 2, 6), (0, 0)), version=isa)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_other_formats_go_elsewhere(name: str) -> None:
    """A kernel without a backward that cuts gradients off; float64 read as float32."""
    operation, make = CASES[name]
    inputs = make(5, 1, (2, 1, 8, 8))
    exact = [None if x is None else x.double() for x in inputs]
    queries = make_queries([5], [5])
    assert operation.chosen() == ISAS[-1]
    for found, expected in zip(
        operation(*exact, queries), operation(*exact, queries, version="reference"), strict=True
    ):
        assert found.dtype == torch.float64 and (found - expected).norm() <= 1e-9 * expected.norm()
    learnt = [None if x is None else x.requires_grad_() for x in inputs]
    out, _ = operation(*learnt, queries)
    out.sum().backward()
    assert learnt[0] is not None and learnt[0].grad is not None
