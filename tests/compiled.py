"""The compiled versions that this machine can run, for tests of every one of them."""

import pytest

from foveal.kernels.cpu.library import instruction_sets

ISAS = [kernels.isa for kernels in instruction_sets()]

each_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param(None, marks=pytest.mark.skip("no compiled kernels"))])
"""Runs a test once for each instruction set, as the argument `isa`: the `version` to force."""
