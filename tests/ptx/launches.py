"""Launches of Triton kernels on CPU tensors: compiled for a card, and run by the machine."""

from collections.abc import Callable
from typing import Any

from gpu_compile import compile_for

from foveal.kernels.gpu import device
from foveal.kernels.gpu.device import Card
from foveal.kernels.gpu.launch import Launch
from ptx.machine import run

EMULATED = (80, 86, 89, 90, 120)
"""Compute capabilities of which the machine knows all instructions."""


def emulate(capability: int, setattr_: Callable[[Any, str, Any], None]) -> None:
    """From now on launches on CPU tensors are for a card of two multiprocessors, which the machine stands in for."""

    def run_emulated(launch: Launch) -> None:
        if 0 not in launch.grid:
            compiled = compile_for(launch, capability)
            run(compiled.ptx, compiled.shared_memory, launch.grid, compiled.arguments)

    device.card_of.cache_clear()
    setattr_(device, "INTERPRETER", Card(capability, 2))
    setattr_(Launch, "run", run_emulated)
