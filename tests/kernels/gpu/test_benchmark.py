"""benchmarks/gpu.py, whose checks are the first thing to run on a card: here they run interpreted, or emulated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_FOLDER = Path(__file__).parents[3] / "benchmarks"
EMULATED = "FOVEAL_TEST_CARD" in os.environ


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(_FOLDER))
    import gpu

    return gpu


def test_checks_every_kernel(benchmark, interpreted: None) -> None:
    """A case whose arguments its kernel does not take, or whose result is not what it is compared with."""
    from gpu_cases import Sizes

    torch.manual_seed(0)
    latent = {"heads": 2, "rank": 32, "rope": 8, "index_heads": 2, "index_dim": 32}
    grouped = {"groups": 2, "group": 2, "head_dim": 16}
    dtype = torch.bfloat16 if EMULATED else torch.float32
    sizes = Sizes(batch=2, context=130, chunk=2, train=4, topk=20, dtype=dtype, **latent, **grouped)
    errors = benchmark.check(sizes, torch.device("cpu"))
    assert len(errors) == 21 and max(errors.values()) < (4e-3 if EMULATED else 1e-4)


@pytest.mark.skipif(not EMULATED, reason="the interpreter has no tensor cores")
def test_tiles_of_a_real_model(benchmark, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of whole tiles, which small heads and ranks do not fill: layouts of fragments, swizzles, wgmma."""
    import gpu_cases
    from gpu_cases import Sizes

    for long in ("_experts", "_training"):  # minutes in the machine, or gigabytes
        monkeypatch.setattr(gpu_cases, long, lambda sizes, device: ())
    errors = benchmark.check(Sizes(batch=2, context=210, chunk=3, train=2, topk=70, heads=70), torch.device("cpu"))
    assert len(errors) == 17 and max(errors.values()) < 4e-3


def test_a_wrong_kernel_is_named(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing a kernel whose results are wrong, NaN among them, as if it were a good one."""
    from gpu_cases import Case, Sizes

    def run(wrong: float):
        return lambda version: torch.tensor([1.0, wrong if version == "triton" else 2.0])

    found = [Case("good", run(2.001)), Case("bad", run(2.5)), Case("worse", run(torch.nan))]
    monkeypatch.setattr(benchmark, "cases", lambda sizes, device: found)
    with pytest.raises(SystemExit, match=r"^wrong results: bad \(.*\), worse \(nan\)$"):
        benchmark.check(Sizes(), torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_device() -> None:
    """A trace, or a table of nothing, on a machine without a GPU."""
    result = subprocess.run([sys.executable, str(_FOLDER / "gpu.py")], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no CUDA device" in result.stderr
