"""What every test shares: where the data lies, one thread, no network, and random numbers of its own."""

import os
import zlib
from pathlib import Path

import pytest

# Before torch loads: pytest-xdist already runs a process a core, and more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's interpreter runs the GPU kernels on the CPU. `make cuda`, the tests on a card, switches it off; so do tests
# of what is compiled for a card and run by the PTX machine (tests/kernels/gpu/conftest.py). Read when Triton is
# imported, which parts of torch do.
if "FOVEAL_TEST_CARD" in os.environ:
    os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture is made."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        if os.environ["TRITON_INTERPRET"] == "1":
            pytest.skip("Triton is interpreted in this run; on a card: TRITON_INTERPRET=0 pytest -m cuda")
        # Of convolutions; of matrix products it is off. Beside exact float32 it would be off by a thousandth.
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test computes."""
    return str(request.param)


@pytest.fixture(autouse=True)
def own_random_numbers(request: pytest.FixtureRequest) -> None:
    """The same for a test wherever it runs: xdist deals tests out in another order every time."""
    import torch

    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder named by FOVEAL_TEST_DATA; the test is skipped without one."""
    folder = os.environ.get("FOVEAL_TEST_DATA")
    if not folder:
        pytest.skip("FOVEAL_TEST_DATA names no folder: real models and texts are not at hand")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"FOVEAL_TEST_DATA={folder} is no directory")
    return path
