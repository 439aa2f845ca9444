"""Steps on a GPU that is not there: shapes alone are computed, and whatever would make the host wait is an error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.kernels.gpu.device import card_of
from foveal.nn import rope

DEVICE = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Counts what goes to the device and what comes back; AssertionError for a copy that the host would wait for.

    What reads a number from the device (`item`, `nonzero`, indexing by truth values) is refused by torch's fake tensors
    themselves: they have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.fetched = 0, 0
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # an operation that is made of others: these are looked at
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func.overloadpacket.__name__
        if name == "_pin_memory":
            self._pinned.append(torch.empty_like(args[0]))
            return self._pinned[-1]
        if name == "_local_scalar_dense" and args[0].device.type == "cpu":
            return 0  # of a copy on the host
        if name in ("_to_copy", "copy_"):
            self._copied(name, args, kwargs)
        if name in ("index", "index_put_", "index_put"):
            _check_indices(args[0], args[1])
        return func(*args, **kwargs)

    def _copied(self, name: str, args: Any, kwargs: Any) -> None:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        if target.type == source.device.type:
            return
        if target.type == "cpu":
            self.fetched += 1
            return
        waits_not = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
        assert waits_not, f"a copy of {tuple(source.shape)} to the device that the host waits for"
        assert any(source is one for one in self._pinned), "what is sent without waiting must be pinned"
        self.sent += 1


class Bindings(TorchFunctionMode):
    """What torch's own bindings ask the device's driver for, even of fake tensors, by operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            viewed, tensors = _basic(args[0], args[1])
            return torch.ops.aten.index(viewed, tensors) if tensors else viewed
        if func is Tensor.__setitem__:
            viewed, tensors = _basic(args[0], args[1])
            if tensors:
                assert isinstance(args[2], Tensor), "a number that has to be sent first"
                return torch.ops.aten.index_put_(viewed, tensors, args[2])
            number = not isinstance(args[2], Tensor)
            return viewed.fill_(args[2]) if number else torch.ops.aten.copy_(viewed, args[2])
        if func is Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args, (kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def _basic(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """x with everything of the index applied but its tensors, and these, by dimension."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(part is not None and part is not ... for part in parts)
    tensors: list[Tensor | None] = []
    dim = 0
    for part in parts:
        assert not isinstance(part, list), "a list that has to be sent first"
        if part is ...:
            dim += x.dim() - dim - (taken - dim)
            continue
        if isinstance(part, int):
            x = torch.ops.aten.select(x, dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        else:
            tensors += [None] * (dim - len(tensors)) + [part]
        dim += 1
    return x, tensors


def _check_indices(values: Tensor, indices: Any) -> None:
    for one in indices:
        if one is not None and values.device.type == "cuda":
            assert one.device.type == "cuda", "an index that has to be sent first"
            assert one.dtype != torch.bool, "truth values have to be counted by the host"


@contextmanager
def device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Within: tensors on `DEVICE` have shapes and no numbers, and kernels are planned for a card, not launched."""

    def forget() -> None:
        for cached in (rope.frequencies_of, rope._frequencies_on, card_of):
            cached.cache_clear()

    forget()
    monkeypatch.setattr("foveal.kernels.gpu.launch.Launch.run", lambda launch: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    try:
        with Bindings(), FakeTensorMode(), Waits() as waits:
            yield waits
    finally:
        forget()


def on_device(make: Callable[[], torch.nn.Module]) -> Any:
    """A module whose parameters are there."""
    with torch.device(DEVICE):
        return make()
