"""The compiled backward pass of the selective scan against autograd through the naive loop in float64."""

from typing import Any

import pytest
import torch
from compiled import ISAS, each_isa
from packing import make_queries
from torch import Tensor

from foveal.kernels import selective_scan
from foveal.kernels.cpu.scan import BLOCK, CHUNK

# One token, none, several sequences; chunks that are full, that begin inside another's, that a token is left of.
LENGTHS = [[1], [0, 1, 3, 0, 1], [CHUNK + 1, 0, CHUNK, 2 * CHUNK, 70]]
# (channels, states): less than a register, remainders everywhere, whole registers, more than one block.
SIZES = [(1, 1), (33, 5), (BLOCK + 6, 16), (2 * BLOCK, 32), (2 * BLOCK + 3, 23)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and checkpoints that are not written are NaN."""
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype=None: torch.full(*shape, torch.nan, dtype=dtype))


def make_inputs(tokens: int, sequences: int, channels: int, states: int) -> list[Tensor]:
    u, dt, b, c = (torch.randn(tokens, n) for n in (channels, channels, states, states))
    return [u, dt.abs(), -3 * torch.rand(channels, states), b, c, torch.randn(sequences, channels, states)]


def results(inputs: list[Tensor], lengths: list[int], version: str, weigh: tuple[bool, bool] = (True, True)) -> Any:
    """y, the last states, and the gradients of all inputs; `weigh`: which of the two results are used."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = selective_scan(*inputs, make_queries(lengths, lengths), version=version)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    used = [(weight * out).sum() for weight, out, is_used in zip(weights, outputs, weigh, strict=True) if is_used]
    return [*outputs, *torch.autograd.grad(sum(used), inputs, allow_unused=True, materialize_grads=True)]


def check(inputs: list[Tensor], lengths: list[int], isa: str, weigh: tuple[bool, bool] = (True, True)) -> None:
    found = results(inputs, lengths, f"{isa}_recomputed", weigh)
    expected = results([x.double() for x in inputs], lengths, "reference", weigh)
    for result, wanted in zip(found, expected, strict=True):
        assert result.shape == wanted.shape and result.dtype == torch.float32
        assert (result.double() - wanted).norm() <= 2e-6 * max(wanted.norm(), 1.0)


@each_isa
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(isa: str, sizes: tuple[int, int], lengths: list[int]) -> None:
    """Lanes, channels or blocks that are left out; a chunk from another's checkpoint; sequences mixed up."""
    check(make_inputs(sum(lengths), len(lengths), *sizes), lengths, isa)


@each_isa
@pytest.mark.parametrize("weigh", [(True, False), (False, True)])
def test_only_one_result_is_used(isa: str, weigh: tuple[bool, bool]) -> None:
    """A gradient that did not arrive being read all the same."""
    check(make_inputs(43, 2, 20, 16), [3, 40], isa, weigh)


@each_isa
def test_strong_decays(isa: str) -> None:
    """A state that is divided by a decay which underflowed."""
    inputs = make_inputs(80, 1, 20, 16)
    inputs[1][::7] *= 300
    check(inputs, [80], isa)


@each_isa
def test_strides(isa: str) -> None:
    """Inputs that are slices of wider projections, gradients that are one number expanded."""
    inputs = make_inputs(40, 2, 20, 16)
    wide = [torch.cat((x, x), 1)[:, : x.shape[1]] if len(x) == 40 else x for x in inputs]
    for found, wanted in zip(*(results(x, [7, 33], f"{isa}_recomputed") for x in (wide, inputs)), strict=True):
        assert torch.equal(found, wanted)
    u, *rest = inputs
    gradients = []
    for version in (f"{isa}_recomputed", "torch"):
        y, _ = selective_scan(
            leaf := u.clone().requires_grad_(), *rest, make_queries([7, 33], [7, 33]), version=version
        )  # type: ignore[call-arg]
        gradients.append(torch.autograd.grad(y.sum(), leaf)[0])
    assert (gradients[0] - gradients[1]).norm() <= 2e-6 * gradients[1].norm()


@each_isa
def test_threads_change_nothing(isa: str) -> None:
    """Sums over channels in the order in which threads finish; two threads that share memory."""
    inputs, before, found = make_inputs(141, 3, 5 * BLOCK + 7, 16), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(inputs, [60, 1, 80], f"{isa}_recomputed"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_it_is_chosen_and_says_what_it_cannot() -> None:
    """Training left to torch, inference that keeps checkpoints; second derivatives that are silently wrong."""
    assert selective_scan.chosen(gradients=True) == f"{ISAS[-1]}_recomputed"
    assert selective_scan.chosen() == ISAS[-1]
    u, *rest = make_inputs(5, 1, 8, 4)
    y, _ = selective_scan(u.requires_grad_(), *rest, make_queries([5], [5]))
    (gradient,) = torch.autograd.grad((y**2).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
