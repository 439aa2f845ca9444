"""Compiled experts against the reference in float64."""

from typing import Any

import pytest
import torch
from compiled import each_isa
from torch.nn.functional import gelu, silu

from foveal.kernels import QuantisedWeight, experts, quantise_weight

# Of the whole result's norm: sums in float32, fixed point at both products, or bfloat16 between and after them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def make_arguments(tokens: int, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, weights, chosen, gate_up, down of six experts, the last of which nobody chooses."""
    x = torch.randn(tokens, 96).to(dtype)
    gate_up, down = (torch.randn(6, *shape).to(dtype) * shape[1] ** -0.5 for shape in ((128, 96), (96, 64)))
    weights = torch.rand(tokens, 3)
    chosen = torch.stack([torch.randperm(5)[:3] for _ in range(tokens)])
    if kind == "plain":
        return x, weights, chosen, gate_up, down
    return x, weights, chosen, quantise_weight(gate_up, kind), quantise_weight(down, kind)


def in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weights, chosen, *stacks = arguments
    wide = [s.dequantise(torch.float64) if isinstance(s, QuantisedWeight) else s.double() for s in stacks]
    return x.double(), weights, chosen, *wide


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_experts(isa: str, dtype: torch.dtype, kind: str, tokens: int) -> None:
    """A token getting another's expert, weight or row; experts with one token, many, and none."""
    arguments = make_arguments(tokens, kind, dtype)
    expected = experts(*in_float64(arguments), silu, version="reference")
    result = experts(*arguments, silu, version=isa)
    assert result.dtype == dtype and result.shape == expected.shape
    assert (result.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


@each_isa
@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_one_expert_for_all(isa: str, kind: str) -> None:
    """More rows of one expert than an item takes."""
    x, weights, _, gate_up, down = make_arguments(300, kind, torch.float32)
    arguments = (x, weights[:, :1].contiguous(), torch.full((300, 1), 2), gate_up, down)
    expected = experts(*in_float64(arguments), silu, version="reference")
    assert (experts(*arguments, silu, version=isa) - expected).norm() < 1e-4 * expected.norm()


@each_isa
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_crowded_and_lonely_experts(isa: str, kind: str) -> None:
    """One call whose items are multiplied in all ways that there are for few and many rows, in bfloat16."""
    x, weights, _, gate_up, down = make_arguments(120, kind, torch.bfloat16)
    chosen = torch.tensor([0] * 90 + [1] * 20 + [2] * 7 + [3] * 2 + [4])[:, None]
    arguments = (x, weights[:, :1].contiguous(), chosen, gate_up, down)
    expected = experts(*in_float64(arguments), silu, version="reference")
    error = (experts(*arguments, silu, version=isa).double() - expected).norm(dim=1)
    assert (error < 2 * TOLERANCE[torch.bfloat16] * expected.norm(dim=1)).all()


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_threads_change_nothing(isa: str, kind: str, dtype: torch.dtype) -> None:
    """A sum over experts in the order in which they were done."""
    arguments = make_arguments(20, kind, dtype)
    alone = experts(*arguments, silu, version=isa)
    torch.set_num_threads(2)
    try:
        assert torch.equal(experts(*arguments, silu, version=isa), alone)
    finally:
        torch.set_num_threads(1)


@each_isa
def test_an_expert_twice(isa: str) -> None:
    """A token that names an expert twice: both places count."""
    x, weights, _, gate_up, down = make_arguments(2, "plain", torch.float32)
    arguments = (x, weights, torch.tensor([[1, 1, 0], [4, 4, 4]]), gate_up, down)
    expected = experts(*in_float64(arguments), silu, version="reference")
    assert (experts(*arguments, silu, version=isa) - expected).norm() < 1e-4 * expected.norm()


@each_isa
def test_no_tokens(isa: str) -> None:
    """An empty batch."""
    arguments = make_arguments(1, "plain", torch.float32)
    none = [tensor[:0] for tensor in arguments[:3]]
    assert experts(*none, *arguments[3:], silu, version=isa).shape == (0, 96)


@each_isa
def test_what_does_not_fit_is_refused(isa: str) -> None:
    """An expert that does not exist, shapes that would be read past their end, an activation that is not compiled."""
    x, weights, chosen, gate_up, down = make_arguments(4, "plain", torch.float32)
    for wrong in (6, -1):
        chosen[2, 1] = wrong
        with pytest.raises(ValueError, match=f"expert {wrong} is chosen, but there are only 6"):
            experts(x, weights, chosen, gate_up, down, silu, version=isa)
    chosen[2, 1] = 0
    with pytest.raises(ValueError, match="do not fit x"):
        experts(x[:, :95], weights, chosen, gate_up, down, silu, version=isa)
    with pytest.raises(ValueError, match="do not fit x"):
        experts(x, weights, chosen, gate_up, down[:5], silu, version=isa)
    with pytest.raises(ValueError, match="do not fit 4 tokens"):
        experts(x, weights[:3], chosen, gate_up, down, silu, version=isa)
    with pytest.raises(ValueError, match="cannot take these arguments"):
        experts(x, weights, chosen, gate_up, down, gelu, version=isa)


def test_other_activations_still_run() -> None:
    """An activation that no compiled version has: the next version serves it."""
    arguments = make_arguments(3, "int8", torch.float32)
    expected = experts(*in_float64(arguments), gelu, version="reference")
    assert (experts(*arguments, gelu) - expected).norm() < 1e-4 * expected.norm()
