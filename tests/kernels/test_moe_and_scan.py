"""Experts and recurrences against their references."""

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
