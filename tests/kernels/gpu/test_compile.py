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
_ELF = b"\x7fELF".hex()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_fits_every_card(capability: int) -> None:
    """A construct that a card's back end refuses, or tiles that need more shared memory than the card has: both would
    only show on that card. In a process of its own: here, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(_PROGRAM), str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    facts = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(facts) >= 14
    too_much = {fact["name"]: fact["shared"] for fact in facts if fact["shared"] > SHARED_MEMORY[capability]}
    assert not too_much, f"of {SHARED_MEMORY[capability]} bytes"
    assert {fact["cubin"] for fact in facts} == {_ELF}
    # Rows are fetched number by number where the compiler loses sight of their alignment; a loop before did it once.
    assert all(fact["copies"] for fact in facts if fact["name"] in ("flash window", "flash selected"))
