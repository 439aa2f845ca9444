"""Which compiled kernels this installation and this machine offer."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Concatenate

import torch
from torch import Tensor

from foveal.kernels.dispatch import Operation, Params, Result

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""All that kernels are compiled for, lowest first."""
LIMIT = "FOVEAL_ISA"
"""The environment variable that names the highest instruction set to use; "none": no compiled kernels."""

DTYPES = (torch.float32, torch.bfloat16)
"""What activations may be."""

_EXTENSION = "foveal.kernels.cpu._native"
# The numbers of `Format` in csrc/common/numbers.h.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}


@dataclass(frozen=True)
class Kernels:
    """The compiled functions of one instruction set."""

    isa: str
    run: Any
    """The extension's submodule: one function an operation."""


@lru_cache
def instruction_sets() -> tuple[Kernels, ...]:
    """What can be used, lowest first; () without the extension, which is not there where no compiler was at hand.

    Raises ValueError where FOVEAL_ISA names none of them.
    """
    extension = _extension()
    offered = [isa for isa in INSTRUCTION_SETS if hasattr(extension, isa)]
    limit = os.environ.get(LIMIT) or (offered[-1] if offered else "none")
    if limit == "none":
        return ()
    if limit not in offered:
        raise ValueError(f"{LIMIT} must be one of {', '.join(['none', *offered])} here, not {limit!r}")
    return tuple(Kernels(isa, getattr(extension, isa)) for isa in offered[: offered.index(limit) + 1])


def installed() -> bool:
    """Whether the extension is there."""
    return _extension() is not None


def is_intel() -> bool:
    """Whether the processor is Intel's, for which torch's float32 products are made; False without the extension."""
    extension = _extension()
    return bool(extension and extension.intel)


def pool_name() -> str | None:
    """Whose threads the kernels run on; None without the extension."""
    extension = _extension()
    return extension.pool_name() if extension else None


def _extension() -> Any:
    if find_spec(_EXTENSION) is None:
        return None
    return import_module(_EXTENSION)


def compiled(
    operation: Operation[Params, Result], accepts: Callable[Params, bool], *, learns: bool = False
) -> Callable[[Callable[Concatenate[Kernels, Params], Result]], Callable[Concatenate[Kernels, Params], Result]]:
    """Register a function as a version of the operation for each instruction set (a decorator).

    The function gets the kernels first. `accepts`: whether they can serve these arguments (dtype, layout, sizes); where
    not, the next slower version does. `learns`: the function is differentiable; its versions, "avx2_recomputed" and so
    on, are to be registered before those without gradients, which calls that want none prefer.
    """

    def register(
        function: Callable[Concatenate[Kernels, Params], Result],
    ) -> Callable[Concatenate[Kernels, Params], Result]:
        for kernels in instruction_sets():
            name = f"{kernels.isa}_recomputed" if learns else kernels.isa
            add = operation.add(name, differentiable=learns, devices=("cpu",), accepts=accepts)
            add(partial(function, kernels))
        return function

    return register


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for None. Whoever calls keeps the tensor alive and has checked its strides."""
    return 0 if tensor is None else tensor.data_ptr()
