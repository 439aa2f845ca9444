"""Finding the compiled kernels, and being told to leave some out."""

import os
import subprocess
import sys

import pytest
import torch
from compiled import ISAS, each_isa

from foveal import kernels
from foveal.kernels import rms_norm
from foveal.kernels.cpu import library


def _run(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, library.LIMIT: isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif("FOVEAL_EXPECT_COMPILED" not in os.environ, reason="FOVEAL_EXPECT_COMPILED is not set")
def test_compiled_kernels_are_there() -> None:
    """A build that fails without a word, after which every test of a compiled kernel is skipped."""
    assert library.installed() and ISAS[0] == "portable"


@each_isa
def test_a_lower_instruction_set_can_be_forced(isa: str) -> None:
    """FOVEAL_ISA that is read and forgotten."""
    code = "from foveal.kernels import rms_norm; print(rms_norm.chosen())"
    assert _run(code, isa).stdout.split() == [isa]


def test_none_leaves_all_of_them_out() -> None:
    """FOVEAL_ISA=none that leaves some compiled version in."""
    code = "from foveal import kernels; print({v for o in kernels.operations() for v in o.versions})"
    versions = eval(_run(code, "none").stdout)
    assert "torch" in versions and versions.isdisjoint(library.INSTRUCTION_SETS)


def test_unknown_instruction_set_is_refused() -> None:
    """A misspelt FOVEAL_ISA that is taken for the best one."""
    result = _run("import foveal.kernels", "avx3")
    assert "FOVEAL_ISA must be one of none" in result.stderr and "'avx3'" in result.stderr


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_what_a_version_does_not_accept_goes_to_the_next() -> None:
    """float64 or float16 read as if it were float32; a forced version that runs all the same."""
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert torch.allclose(rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5, version="reference"))
    with pytest.raises(ValueError, match="cannot take these arguments"):
        rms_norm(x, weight, 1e-5, version=ISAS[-1])


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_gradients_keep_compiled_kernels_away() -> None:
    """A kernel without a backward that runs where gradients are needed, and cuts them off."""
    x = torch.randn(3, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None
    with pytest.raises(ValueError, match="not differentiable"):
        rms_norm(x, torch.ones(8), 1e-5, version=ISAS[-1])


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_threads_are_torch_s() -> None:
    """A second OpenMP runtime, or threads of our own, that fight torch's for the cores."""
    assert library.pool_name() == "torch's OpenMP"


def test_every_operation_is_listed_once() -> None:
    """An operation that `foveal doctor` does not know of."""
    names = [operation.name for operation in kernels.operations()]
    assert len(names) == len(set(names))
    assert {"attention", "select", "sparse_attention", "experts", "rms_norm"} <= set(names)
