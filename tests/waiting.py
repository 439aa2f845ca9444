"""Steps on a GPU that is not there: shapes alone are computed, and whatever would make the host wait is an error.

Its tensors are torch's meta tensors, which have no numbers, and say that they are on the GPU: all of Python believes it
and goes the ways that it would go on a card, while torch's own code (autograd among it) asks no driver for anything.
What is on the host has numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.kernels.gpu.device import card_of
from foveal.nn import rope

DEVICE = torch.device("cuda", 0)
_HOST, _NOWHERE = torch.device("cpu"), torch.device("meta")


class Waits(TorchDispatchMode):
    """Counts what goes to the device and what comes back; AssertionError for a copy that the host would wait for, and
    for operands on both sides.

    What reads a number from the device (`item`, `nonzero`) is refused by meta tensors themselves: they have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.fetched = 0, 0
        self.pinned: list[Tensor] = []
        self.patient = False
        """The host may wait: numbers may be read, and are all 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # an operation that is made of others: these are looked at
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            return self._copy(func, args, kwargs)
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            _check_indices(args[1])
        sides = {x.is_meta for x in _operands(*args, *kwargs.values()) if x.dim()}
        assert len(sides) < 2, f"{name} of tensors on the device and on the host"
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy into another tensor (args: to, from, whether without waiting) or into a new one."""
        source = args[1] if len(args) > 1 else args[0]
        there = args[0].is_meta if len(args) > 1 else torch.device(kwargs.get("device") or source.device) != _HOST
        if there == source.is_meta:
            return func(*args, **kwargs)
        if not there:
            self.fetched += 1
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        waits_not = kwargs.get("non_blocking", False) or args[2:] == (True,) or self.patient
        assert waits_not, f"a copy of {tuple(source.shape)} to the device that the host waits for"
        assert self.patient or source.data_ptr() in {x.data_ptr() for x in self.pinned}, (
            "what is sent without waiting must be pinned"
        )
        self.sent += 1
        return func(*args, **kwargs)


def _operands(*arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _operands(*argument)


def _check_indices(indices: Any) -> None:
    for one in indices:
        if one is not None and any(other is not None and other.is_meta for other in indices):
            assert one.is_meta, "an index that has to be sent first"
            assert one.dtype != torch.bool, "truth values have to be counted by the host"


class Elsewhere(TorchFunctionMode):
    """Python's view of it: `DEVICE` where torch sees its meta device."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            device = func(*args)
            return DEVICE if device == _NOWHERE else device
        if func == Tensor.is_cuda.__get__:
            return args[0].is_meta
        if func is Tensor.pin_memory:
            self._waits.pinned.append(args[0].clone())
            return self._waits.pinned[-1]
        if func is Tensor.tolist and args[0].is_meta:
            return args[0].cpu().tolist()
        if func in _READERS and args[0].is_meta and self._waits.patient:
            return func(args[0].cpu())
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            _check_key(*args)
        if func is Tensor.backward:
            with self:  # so that what is written in Python runs within, too
                one = (torch.ones_like(args[0]),)
                return _engine_run_backward(args, one, False, False, (), allow_unreachable=True, accumulate_grad=True)
        if func is scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == "cuda":
            return func(*args, **kwargs | {"device": "cpu"}).to(_NOWHERE)
        return func(*map(_seen_by_torch, args), **{name: _seen_by_torch(value) for name, value in kwargs.items()})


_READERS = (Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__)


def _seen_by_torch(value: Any) -> Any:
    named = isinstance(value, str) and value.startswith("cuda")
    return _NOWHERE if named or (isinstance(value, torch.device) and value.type == "cuda") else value


def _check_key(x: Tensor, key: Any, value: Any = None) -> None:
    """What the bindings would send to the device on their own."""
    if not x.is_meta:
        return
    parts = key if isinstance(key, tuple) else (key,)
    assert not any(isinstance(part, list) for part in parts), "a list that has to be sent first"
    picks = [part for part in parts if isinstance(part, Tensor)]
    assert all(part.is_meta for part in picks), "an index that has to be sent first"
    assert not picks or value is None or isinstance(value, Tensor), "a number that has to be sent first"


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`. On the device and without a mask (which kernels give for a tile at a time) one of
    its kernels must take the operands whose memory is linear: see
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp."""
    if q.is_meta and attn_mask is None:
        width = q.shape[-1]
        assert width == v.shape[-1] and width % 8 == 0, f"heads of {width} and {v.shape[-1]} numbers"
        flash = q.dtype in (torch.bfloat16, torch.float16) and width <= 256
        assert flash or (q.dtype != torch.float64 and not enable_gqa), f"groups of heads in {q.dtype}, {width} wide"
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT * scale).softmax(-1) @ v


@contextmanager
def device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Within: tensors on `DEVICE` have shapes and no numbers, and kernels are planned for a card, not launched."""

    def forget() -> None:
        for cached in (rope.frequencies_of, rope._frequencies_on, card_of):
            cached.cache_clear()

    forget()
    # It compares devices that are looked up within torch's code with those looked up here.
    monkeypatch.setitem(checkpoint._allowed_determinism_checks_to_fns, "default", lambda x: None)
    monkeypatch.setattr("foveal.kernels.gpu.launch.Launch.run", lambda launch: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    try:
        with Waits() as waits, Elsewhere(waits):
            yield waits
    finally:
        forget()


def on_device(make: Callable[[], torch.nn.Module]) -> Any:
    """A module whose parameters are there."""
    with torch.device(DEVICE):
        return make()
