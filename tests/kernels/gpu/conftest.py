"""Triton's interpreter runs these kernels on the CPU, or, with FOVEAL_TEST_CARD=80 (89, 90, 120), the PTX machine runs
what is compiled for that card. Where there is no Triton, there is nothing to test."""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest

from foveal import kernels

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go to the machine, if that was asked for."""
    if capability := os.environ.get("FOVEAL_TEST_CARD"):
        from ptx.launches import emulate

        emulate(int(capability), monkeypatch.setattr)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton versions also run on CPU tensors, and before any other."""
    for operation in kernels.operations():
        version = operation._versions.get("triton")
        if version is not None:
            both = {**operation._versions, "triton": replace(version, devices=("cpu", "cuda"))}
            monkeypatch.setattr(operation, "_versions", both)
            monkeypatch.setattr(operation, "_preferred", tuple(reversed(both.values())))
