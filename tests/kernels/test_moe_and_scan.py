"""Experts and recurrences against their references."""

from dataclasses import replace

import pytest
import torch
from packing import close, make_queries
from torch.nn.functional import silu

from foveal.kernels import causal_conv, experts, selective_scan


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_experts(tokens: int) -> None:
    """A token getting another's expert or weight when tokens are grouped; experts that nobody chose."""
    x = torch.randn(tokens, 8, dtype=torch.float64)
    gate_up, down = (torch.randn(6, *shape, dtype=torch.float64) for shape in ((10, 8), (8, 5)))
    weights = torch.rand(tokens, 3, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(5)[:3] for _ in range(tokens)])  # nobody chooses the sixth
    arguments = (x, weights, chosen, gate_up.unbind(0), down.unbind(0), silu)
    result = experts(*arguments)
    expected = experts(*arguments, version="reference")
    assert (result - expected).norm() < 1e-6 * expected.norm()  # summed in float32


def test_experts_gradients() -> None:
    """A gradient lost between tokens, weights and experts."""
    x = torch.randn(7, 4, requires_grad=True)
    gate_up, down = torch.randn(3, 6, 4, requires_grad=True), torch.randn(3, 4, 3, requires_grad=True)
    weights, chosen = torch.rand(7, 2, requires_grad=True), torch.tensor([[0, 2]] * 7)
    grads = []
    for version in ("reference", "torch"):
        out = experts(x, weights, chosen, gate_up.unbind(0), down.unbind(0), silu, version=version)
        grads.append(torch.autograd.grad((out**2).sum(), (x, gate_up, down, weights)))
    for result, expected in zip(grads[1], grads[0], strict=True):
        assert torch.allclose(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_at_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version for GPUs, whose products torch also has for the CPU: a group that begins at another's rows, an expert
    that nobody chose; a gradient lost on the way."""
    version = experts._versions["grouped"]
    monkeypatch.setitem(experts._versions, "grouped", replace(version, devices=("cpu",)))
    x, gate_up, down = (torch.randn(*shape).bfloat16() for shape in ((tokens, 8), (6, 32, 8), (6, 8, 16)))
    weights = torch.rand(tokens, 3)
    chosen = torch.stack([torch.randperm(5)[:3] for _ in range(tokens)])  # nobody chooses the sixth
    upstream = torch.randn(tokens, 8)
    results = []
    for name, dtype in (("grouped", torch.bfloat16), ("reference", torch.float64)):
        inputs = [one.to(dtype).requires_grad_() for one in (x, gate_up, down)] + [weights.clone().requires_grad_()]
        out = experts(inputs[0], inputs[3], chosen, inputs[1], inputs[2], silu, version=name)
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(out))])
    for mine, exact in zip(*results, strict=True):
        assert (mine - exact).norm() < 0.01 * exact.norm()


def test_what_is_not_taken_at_once() -> None:
    """Rows that torch's product would refuse."""
    chosen = torch.zeros(2, 1, dtype=torch.int64)
    accepts = experts._versions["grouped"].accepts
    assert accepts is not None
    for width, dtype, taken in ((16, torch.bfloat16, True), (12, torch.bfloat16, False), (16, torch.float32, False)):
        x, gate_up, down = (torch.zeros(*shape, dtype=dtype) for shape in ((2, width), (3, 32, width), (3, width, 16)))
        assert accepts(x, torch.ones(2, 1), chosen, gate_up, down, silu) == taken


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 1, 9, 9], [4, 7]])
def test_selective_scan(lengths: list[int]) -> None:
    """Sequences of different lengths side by side mixing their states or losing their order."""
    total, queries = sum(lengths), make_queries(lengths, lengths)
    u, dt, b, c = (torch.randn(total, n, dtype=torch.float64) for n in (6, 6, 3, 3))
    a, state = -torch.rand(6, 3, dtype=torch.float64), torch.randn(len(lengths), 6, 3, dtype=torch.float64)
    arguments = (u, dt.abs(), a, b, c, state, queries)
    for result, expected in zip(
        selective_scan(*arguments), selective_scan(*arguments, version="reference"), strict=True
    ):
        close(result, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [2, 9, 1]])
def test_causal_conv(lengths: list[int], bias: bool) -> None:
    """A window that reaches into the neighbouring sequence, or the state of a sequence shorter than the window."""
    total, queries = sum(lengths), make_queries(lengths, lengths)
    x, weight = torch.randn(total, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    state = torch.randn(len(lengths), 3, 5, dtype=torch.float64)
    arguments = (x, weight, torch.randn(5, dtype=torch.float64) if bias else None, state, queries)
    for result, expected in zip(causal_conv(*arguments), causal_conv(*arguments, version="reference"), strict=True):
        close(result, expected)
