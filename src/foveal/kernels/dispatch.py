"""How an operation finds the version that runs: by device, gradients and what a version can take, or by name."""

from collections.abc import Callable, Iterator
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
    accepts: Callable[Params, bool] | None
    """Whether it can serve some arguments; None: it serves all."""
    special: bool = False
    """Preferred for the few arguments that it accepts: no call's usual version."""


class Operation(Generic[Params, Result]):
    """A public operation with its versions, fastest last.

    Call it like a function; `version="reference"` forces one. The public signature, shapes and errors are in `doc`.
    """

    def __init__(self, name: str, doc: str, reference: Callable[Params, Result], differentiable: bool) -> None:
        self.name = name
        self.__doc__ = doc
        self._versions: dict[str, Version[Params, Result]] = {}
        self._add(Version("reference", reference, differentiable, ("cpu", "cuda"), None))

    def add(
        self,
        name: str,
        *,
        differentiable: bool,
        devices: tuple[str, ...] = ("cpu", "cuda"),
        accepts: Callable[Params, bool] | None = None,
        special: bool = False,
    ) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
        """Register a version (a decorator). Later ones are preferred, for arguments that they accept."""

        def register(function: Callable[Params, Result]) -> Callable[Params, Result]:
            self._add(Version(name, function, differentiable, devices, accepts, special))
            return function

        return register

    @property
    def versions(self) -> tuple[str, ...]:
        """Names of all versions, the preferred one last, but for those of special arguments."""
        return tuple(self._versions)

    def chosen(self, device: str = "cpu", *, gradients: bool = False) -> str:
        """The version that a call on `device` usually runs: the preferred one for arguments that all accept."""
        return next(version.name for version in self._candidates(device, gradients) if not version.special)

    def __call__(self, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        """Run the preferred version for the arguments given. ValueError where a forced one cannot serve them."""
        forced = kwargs.pop("version", None) if kwargs else None
        gradients = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
        )
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device.type
        if forced is not None:
            return self._forced(str(forced), device, gradients, args, kwargs)
        for version in self._candidates(device, gradients):
            if version.accepts is None or version.accepts(*args, **kwargs):
                return version.run(*args, **kwargs)
        raise AssertionError("references accept everything")

    def _forced(self, name: str, device: str, gradients: bool, args: Any, kwargs: Any) -> Result:
        version = self._versions.get(name)
        if version is None:
            raise ValueError(f"{self.name} has no version {name!r} (only {', '.join(self.versions)})")
        if gradients and not version.differentiable:
            raise ValueError(f"{self.name}: version {name!r} is not differentiable, and gradients are needed")
        if device not in version.devices:
            raise ValueError(f"{self.name}: version {name!r} does not run on {device}")
        if version.accepts is not None and not version.accepts(*args, **kwargs):
            dtypes = [str(value.dtype) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            raise ValueError(f"{self.name}: version {name!r} cannot take these arguments ({', '.join(dtypes)})")
        return version.run(*args, **kwargs)

    def _add(self, version: Version[Params, Result]) -> None:
        assert version.name not in self._versions
        self._versions[version.name] = version
        self._preferred = tuple(reversed(self._versions.values()))

    def _candidates(self, device: str, gradients: bool) -> Iterator[Version[Params, Result]]:
        """Versions that run here, the preferred one first."""
        found = False
        for version in self._preferred:
            if device in version.devices and (version.differentiable or not gradients):
                found = True
                yield version
        if not found:
            raise ValueError(f"{self.name} has no version for {device}" + (" with gradients" if gradients else ""))


def operation(*, differentiable: bool) -> Callable[[Callable[Params, Result]], Operation[Params, Result]]:
    """Make an operation of its naive reference; the docstring becomes the operation's."""

    def make(reference: Callable[Params, Result]) -> Operation[Params, Result]:
        name: Any = getattr(reference, "__name__", "operation")
        return Operation(str(name), reference.__doc__ or "", reference, differentiable)

    return make
