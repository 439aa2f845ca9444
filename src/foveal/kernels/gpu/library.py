"""Registering Triton versions of operations, without importing Triton before one runs."""

from collections.abc import Callable
from importlib.util import find_spec

from foveal.kernels.dispatch import Operation, Params, Result

VERSION = "triton"


def installed() -> bool:
    """Whether Triton is there."""
    return find_spec("triton") is not None


def triton_version(
    operation: Operation[Params, Result], accepts: Callable[Params, bool], *, differentiable: bool = False
) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
    """Register a function as version "triton" on CUDA devices, where Triton is installed (a decorator).

    accepts: whether it can serve these arguments; where not, torch does.
    """

    def register(function: Callable[Params, Result]) -> Callable[Params, Result]:
        if installed():
            operation.add(VERSION, differentiable=differentiable, devices=("cuda",), accepts=accepts)(function)
        return function

    return register
