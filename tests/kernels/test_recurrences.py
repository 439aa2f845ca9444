"""Recurrences: chunks of any size and single steps against the naive loops, with their gradients, in float64."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from packing import make_queries
from torch import Tensor

from foveal.kernels import causal_conv, delta, delta_rule, linear_attention, s4d, scan, selective_scan, ssd
from foveal.kernels.rounds import in_rounds

LENGTHS = [[1], [1, 1, 1], [5, 1, 9, 9], [70, 7, 64]]
HEADS, GROUPS, KEY, VALUE = 4, 2, 6, 5


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def scan_inputs(tokens: int, sequences: int) -> list[Tensor]:
    u, dt, b, c = rand(tokens, 6), rand(tokens, 6).abs(), rand(tokens, 3), rand(tokens, 3)
    return [u, dt, -rand(6, 3).abs(), b, c, rand(sequences, 6, 3)]


def s4d_inputs(tokens: int, sequences: int) -> list[Tensor]:
    a = torch.stack((-rand(6, 3).abs(), 3 * rand(6, 3)), -1)
    return [rand(tokens, 6), rand(6).abs(), a, rand(6, 3, 2), rand(sequences, 6, 3, 2)]


def conv_inputs(tokens: int, sequences: int) -> list[Tensor]:
    return [rand(tokens, 5), rand(5, 4), rand(5), rand(sequences, 3, 5)]


def ssd_inputs(tokens: int, sequences: int) -> list[Tensor]:
    x, dt = rand(tokens, HEADS, VALUE), rand(tokens, HEADS).abs()
    b, c = rand(tokens, GROUPS, KEY), rand(tokens, GROUPS, KEY)
    return [x, dt, -rand(HEADS).abs(), b, c, rand(sequences, HEADS, VALUE, KEY)]


def attention_inputs(tokens: int, sequences: int, decays: int = KEY) -> list[Tensor]:
    q, k = rand(tokens, GROUPS, KEY), unit(rand(tokens, GROUPS, KEY))
    decay = -rand(tokens, HEADS, decays).abs()
    return [q, k, rand(tokens, HEADS, VALUE), decay, rand(sequences, HEADS, KEY, VALUE)]


def plain_inputs(tokens: int, sequences: int) -> list[Tensor]:
    *inputs, decay, state = attention_inputs(tokens, sequences, 1)
    return [*inputs, torch.zeros_like(decay), state]


def delta_inputs(tokens: int, sequences: int, decays: int = KEY) -> list[Tensor]:
    *inputs, state = attention_inputs(tokens, sequences, decays)
    return [*inputs, rand(tokens, HEADS).sigmoid(), state]


CASES: dict[str, tuple[Any, Callable[[int, int], list[Tensor]]]] = {
    "selective scan": (selective_scan, scan_inputs),
    "s4d": (s4d, s4d_inputs),
    "convolution": (causal_conv, conv_inputs),
    "ssd": (ssd, ssd_inputs),
    "linear attention": (linear_attention, plain_inputs),
    "gated linear attention": (linear_attention, attention_inputs),
    "decay by head": (linear_attention, lambda *sizes: attention_inputs(*sizes, decays=1)),
    "gated delta rule": (delta_rule, lambda *sizes: delta_inputs(*sizes, decays=1)),
    "kimi delta attention": (delta_rule, delta_inputs),
}


def results(operation: Any, inputs: list[Tensor], lengths: list[int], version: str) -> list[Tensor]:
    """Outputs, states, and the gradients of all inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = operation(*inputs, make_queries(lengths, lengths), version=version)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(out.shape, dtype=out.dtype, generator=generator) for out in outputs]
    loss = sum((weight * out).sum() for weight, out in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1.0, float(other.detach().abs().max()))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fast_forms_are_the_naive_ones(name: str, lengths: list[int]) -> None:
    """A wrong decay within or between chunks, states or gradients mixed up between sequences, heads or groups."""
    torch.manual_seed(0)
    operation, make = CASES[name]
    inputs = make(sum(lengths), len(lengths))
    agree(results(operation, inputs, lengths, "torch"), results(operation, inputs, lengths, "reference"))


@pytest.mark.parametrize("size", [2, 3, 13, 64])
@pytest.mark.parametrize("decays", [1, KEY])
@pytest.mark.parametrize("with_delta", [False, True])
def test_chunks_of_any_size(size: int, decays: int, with_delta: bool) -> None:
    """A chunk that does not divide a length: the tokens of zeros behind it must change nothing."""
    torch.manual_seed(0)
    lengths = [17, 1, 30]
    inputs = (delta_inputs if with_delta else attention_inputs)(sum(lengths), len(lengths), decays)
    operation: Any = delta_rule if with_delta else linear_attention
    *tokens, state = (x.requires_grad_() for x in inputs)
    queries = make_queries(lengths, lengths)
    found = in_rounds(delta._chunk, tokens, state, queries, size)
    expected = operation(*tokens, state, queries, version="reference")
    agree(list(found), list(expected))
    for out, other in zip(found, expected, strict=True):
        both = (torch.autograd.grad((x**2).sum(), inputs, retain_graph=True, allow_unused=True) for x in (out, other))
        agree(*([x for x in grads if x is not None] for grads in both))


@pytest.mark.parametrize("size", [2, 13, 64])
def test_convolutions_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An FFT that wraps around, and a state that skips a power between chunks."""
    monkeypatch.setattr(sys.modules["foveal.kernels.s4d"], "_CHUNK", size)  # the function hides its module
    torch.manual_seed(0)
    lengths = [17, 1, 30]
    inputs = s4d_inputs(sum(lengths), len(lengths))
    agree(results(s4d, inputs, lengths, "torch"), results(s4d, inputs, lengths, "reference"))


def test_s4d_is_the_published_convolution() -> None:
    """A recurrence that is another discretisation: K[l] = 2 Re sum C (e^{dt A} - 1) / A e^{l dt A} on an impulse."""
    torch.manual_seed(0)
    _, dt, a_parts, c_parts, _ = s4d_inputs(1, 1)
    a, c = torch.view_as_complex(a_parts), torch.view_as_complex(c_parts)
    da = dt[:, None] * a
    kernel = torch.stack([2 * (c * (da.exp() - 1) / a * (da * place).exp()).sum(-1).real for place in range(40)])
    impulse = torch.zeros(40, 6, dtype=torch.float64)
    impulse[0] = 1
    nothing = torch.zeros(1, 6, 3, 2, dtype=torch.float64)
    found, _ = s4d(impulse, dt, a_parts, c_parts, nothing, make_queries([40], [40]))
    agree([found], [kernel])


@pytest.mark.parametrize("size", [2, 3, 13, 64])
def test_scans_in_chunks_of_any_size(size: int) -> None:
    """Pieces that do not divide a chunk; a state that does not reach the next chunk, or its gradient the one before."""
    torch.manual_seed(0)
    lengths = [17, 1, 30]
    u, dt, a, b, c, state = inputs = [x.requires_grad_() for x in scan_inputs(sum(lengths), len(lengths))]
    queries = make_queries(lengths, lengths)
    found = in_rounds(partial(scan._chunk, a), (dt * u, dt, b, c), state, queries, size)
    expected = selective_scan(*inputs, queries, version="reference")
    agree(list(found), list(expected))
    losses = [(out**2).sum() + (last**2).sum() for out, last in (found, expected)]
    agree(*(list(torch.autograd.grad(loss, inputs)) for loss in losses))


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_in_pieces(name: str) -> None:
    """A state that is not what the next piece, or the next token, begins with."""
    torch.manual_seed(0)
    operation, make = CASES[name]
    *tokens, state = make(50, 1)
    by_token = [x.shape[0] == 50 for x in tokens]
    whole, last = operation(*tokens, state, make_queries([50], [50]))
    outputs, start = [], 0
    for count in (23, 1, 1, 25):
        piece = [x[start : start + count] if mine else x for x, mine in zip(tokens, by_token, strict=True)]
        out, state = operation(*piece, state, make_queries([count], [count]))
        outputs.append(out)
        start += count
    agree([torch.cat(outputs), state], [whole, last])


@pytest.mark.parametrize(
    "name", ["selective scan", "ssd", "gated linear attention", "gated delta rule", "kimi delta attention"]
)
def test_strong_decays_in_float32(name: str) -> None:
    """Overflow of exp(-sum), or the small decays after a large one lost in the difference of sums."""
    torch.manual_seed(0)
    operation, make = CASES[name]
    inputs = [x.float() for x in make(100, 1)]
    place = 1 if name in ("selective scan", "ssd") else 3
    inputs[place][::7] *= 300
    queries = make_queries([100], [100])
    for found, expected in zip(
        operation(*inputs, queries, version="torch"),
        operation(*(x.double() for x in inputs), queries, version="reference"),
        strict=True,
    ):
        assert found.isfinite().all()
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
