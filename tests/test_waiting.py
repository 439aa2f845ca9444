"""The device that is not there refuses whatever a real one would make the host wait for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from waiting import DEVICE, device_that_is_not_there

from foveal.kernels.transfer import send

WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: x.sum().item(),
    "a truth value": lambda x: bool(x.any()),
    "as many as are true": lambda x: x[x > 0],
    "those that are true": lambda x: x.masked_fill(x > 0, 1)[x > 0],
    "places": lambda x: x.nonzero(),
    "a count of each": lambda x: x.int().bincount(),
    "as often as it says": lambda x: x.repeat_interleave(x.int()),
    "numbers of the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=DEVICE),
    "a tensor of the host": lambda x: x + torch.ones(3).to(DEVICE),
    "memory that is not pinned": lambda x: x + torch.ones(3).to(DEVICE, non_blocking=True),
    "an index of the host": lambda x: x[torch.tensor([0, 2])],
    "a list as an index": lambda x: x[[0, 2]],
    "both sides": lambda x: x + torch.ones(3),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs that prove nothing."""
    with device_that_is_not_there(monkeypatch) as waits:
        x = torch.zeros(3, device=DEVICE)
        with pytest.raises((AssertionError, RuntimeError)):
            WAITS[what](x)
        assert (waits.sent, waits.fetched) == (0, 0)


def test_what_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that refuses everything; copies that are not counted."""
    with device_that_is_not_there(monkeypatch) as waits:
        x = torch.zeros(3, device=DEVICE, requires_grad=True)
        y = (send(torch.ones(3), DEVICE) * x)[send(torch.tensor([0, 2]), DEVICE)]
        assert y.device == DEVICE and y.is_cuda and y.shape == (2,)
        y.sum().backward()
        assert x.grad.device == DEVICE and (waits.sent, waits.fetched) == (2, 0)
        assert x.grad.tolist() == [1.0] * 3 and waits.fetched == 1
