"""How an operation finds the version that runs: by device and by whether gradients are needed, or by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

Params = ParamSpec("Params")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Version(Generic[Params, Result]):
    """One implementation of an operation."""

    name: str
    run: Callable[Params, Result]
    differentiable: bool
    devices: tuple[str, ...]


class Operation(Generic[Params, Result]):
    """A public operation with its versions, fastest last.

    Call it like a function; `version="reference"` forces one. The public signature, shapes and errors are in `doc`.
    """

    def __init__(self, name: str, doc: str, reference: Callable[Params, Result], differentiable: bool) -> None:
        self.name = name
        self.__doc__ = doc
        self._versions: dict[str, Version[Params, Result]] = {}
        self._add("reference", reference, differentiable, ("cpu", "cuda"))

    def add(
        self, name: str, *, differentiable: bool, devices: tuple[str, ...] = ("cpu", "cuda")
    ) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
        """Register a version (a decorator). Later ones are preferred."""

        def register(function: Callable[Params, Result]) -> Callable[Params, Result]:
            self._add(name, function, differentiable, devices)
            return function

        return register

    @property
    def versions(self) -> tuple[str, ...]:
        """Names of all versions, the preferred one last."""
        return tuple(self._versions)

    def chosen(self, device: str = "cpu", *, gradients: bool = False) -> str:
        """The version that a call on `device` runs."""
        return self._choose(device, gradients).name

    def __call__(self, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        """Run the preferred version for the tensors given. ValueError where a forced one cannot serve them."""
        forced = kwargs.pop("version", None)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        device = tensors[0].device.type
        if forced is None:
            return self._choose(device, gradients).run(*args, **kwargs)
        version = self._versions.get(str(forced))
        if version is None:
            raise ValueError(f"{self.name} has no version {forced!r} (only {', '.join(self.versions)})")
        if gradients and not version.differentiable:
            raise ValueError(f"{self.name}: version {forced!r} is not differentiable, and gradients are needed")
        if device not in version.devices:
            raise ValueError(f"{self.name}: version {forced!r} does not run on {device}")
        return version.run(*args, **kwargs)

    def _add(self, name: str, run: Callable[Params, Result], differentiable: bool, devices: tuple[str, ...]) -> None:
        assert name not in self._versions
        self._versions[name] = Version(name, run, differentiable, devices)

    def _choose(self, device: str, gradients: bool) -> Version[Params, Result]:
        for version in reversed(self._versions.values()):
            if device in version.devices and (version.differentiable or not gradients):
                return version
        raise ValueError(f"{self.name} has no version for {device}" + (" with gradients" if gradients else ""))


def operation(*, differentiable: bool) -> Callable[[Callable[Params, Result]], Operation[Params, Result]]:
    """Make an operation of its naive reference; the docstring becomes the operation's."""

    def make(reference: Callable[Params, Result]) -> Operation[Params, Result]:
        name: Any = getattr(reference, "__name__", "operation")
        return Operation(str(name), reference.__doc__ or "", reference, differentiable)

    return make
