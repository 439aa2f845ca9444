"""Every kernel compiles for every card that is promised, at the sizes of real models, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_compile import CAPABILITIES

from foveal.kernels.gpu.device import SHARED_MEMORY

_PROGRAM = Path(__file__).parents[2] / "gpu_plans.py"


# Bytes that hot kernels keep in local memory, where registers do not hold a tile. Elsewhere: none.
_SPILLED = {
    ("latent sparse fp8", 80): 104,
    ("latent sparse fp8", 100): 272,
    ("score fp8", 80): 80,
    ("score fp8", 86): 80,
    ("score fp8", 89): 8,
    ("score fp8", 90): 24,
    ("score fp8", 120): 32,
}
_HOT = ("latent dense", "latent sparse fp8", "score fp8", "score int8")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_fits_every_card(capability: int) -> None:
    """A construct that a card's back end refuses, or tiles that need more shared memory than the card has: both would
    only show on that card. Registers that no longer hold a tile, and keys read a number at a time: those would only be
    slow. In a process of its own: here, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(_PROGRAM), str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    facts = {fact["name"]: fact for fact in map(json.loads, result.stdout.splitlines())}
    assert len(facts) >= 14
    too_much = {name: fact["shared"] for name, fact in facts.items() if fact["shared"] > SHARED_MEMORY[capability]}
    assert not too_much, f"of {SHARED_MEMORY[capability]} bytes"
    for name in _HOT:
        assert facts[name]["spilled"] <= _SPILLED.get((name, capability), 0), name
        loop = facts[name]["loop"]
        assert loop["tensor"] and (loop.get("load 128") or loop.get("asynchronous load 128")), f"{name}: {loop}"
    # Rows are fetched number by number where the compiler loses sight of their alignment; a loop before did it once.
    assert all(facts[name]["loop"].get("asynchronous load 128") for name in ("flash window", "flash selected"))
