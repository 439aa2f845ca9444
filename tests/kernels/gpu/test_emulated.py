"""The compiled kernels, run by the PTX machine: what the interpreter, one thread in float32, cannot see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx.launches import EMULATED

_FOLDER = Path(__file__).parent
pytestmark = pytest.mark.skipif("FOVEAL_TEST_CARD" in os.environ, reason="these tests are run by this one")


def _run_tests(capability: int, *arguments: str) -> None:
    """In a process of its own, where Triton does not interpret."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "FOVEAL_TEST_CARD": str(capability)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize(
    "capability", [x if x in (80, 90, 100) else pytest.param(x, marks=pytest.mark.slow) for x in EMULATED]
)
def test_products_and_races(capability: int) -> None:
    """Products in bfloat16, e4m3 and int8; a barrier that is missing; memory that is left, or read before anything is
    there; what only one card's code has."""
    _run_tests(capability, str(_FOLDER / "test_benchmark.py"), "-k", "every_kernel or real_model")


@pytest.mark.slow
@pytest.mark.parametrize("capability", EMULATED)
def test_everything_that_is_interpreted(capability: int) -> None:
    """Odd sizes, selections of nothing, page tables, NaN beside what is owned, in each card's code."""
    _run_tests(capability, str(_FOLDER), "--deselect", str(_FOLDER / "test_compile.py"))
