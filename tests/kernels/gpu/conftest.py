"""Triton's interpreter runs these kernels on the CPU; where there is no Triton, there is nothing to test."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from foveal import kernels

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton versions also run on CPU tensors, and before any other."""
    for operation in kernels.operations():
        version = operation._versions.get("triton")
        if version is not None:
            both = {**operation._versions, "triton": replace(version, devices=("cpu", "cuda"))}
            monkeypatch.setattr(operation, "_versions", both)
            monkeypatch.setattr(operation, "_preferred", tuple(reversed(both.values())))
