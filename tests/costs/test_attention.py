"""Counting multiply-accumulates: against brute force, and DeepSeek-V3.2's published arithmetic."""

import subprocess
import sys

import pytest

from foveal.config.model import MLAConfig, RopeConfig
from foveal.costs import causal_pairs, cheapest_mla_form, mla_macs, selected_pairs

V32 = MLAConfig(128, 1536, 512, 128, 64, 128, 0.1, RopeConfig(64, 1e4))


@pytest.mark.parametrize(("queries", "context", "topk"), [(1, 1, 4), (3, 10, 4), (10, 10, 4), (5, 6, 4), (4, 4, 8)])
def test_pairs(queries: int, context: int, topk: int) -> None:
    """An off-by-one in the triangle, or in where the selection begins to bite."""
    seen = [position + 1 for position in range(context - queries, context)]
    assert causal_pairs(queries, context) == sum(seen)
    assert selected_pairs(queries, context, topk) == sum(min(topk, n) for n in seen)


def test_deepseek_v32() -> None:
    """8,495,104 MACs a context token over 61 layers absorbed, 17,397,972,992 for a selection of 2048."""
    step = mla_macs(V32, 1, 100_001, 2048)["absorbed"] - mla_macs(V32, 1, 100_000, 2048)["absorbed"]
    assert 61 * step == 8_495_104
    absorption = mla_macs(V32, 1, 0)["absorbed"]
    assert 61 * (mla_macs(V32, 1, 100_000, 2048)["sparse"] - absorption) == 17_397_972_992


def test_choice() -> None:
    """Prefill should expand, decode absorb; a selection should pay once the context is long, not while it is short."""
    assert cheapest_mla_form(V32, 2048, 2048, 2048) == "expanded"
    assert cheapest_mla_form(V32, 1, 2048, 2048) == "absorbed"
    assert cheapest_mla_form(V32, 4096, 4096, 2048) == "masked"
    assert cheapest_mla_form(V32, 32768, 32768, 2048) == "sparse"
    assert cheapest_mla_form(V32, 1, 4096, 2048) == "sparse"


def test_no_torch() -> None:
    """Configs and costs must answer without the second and a half that importing torch takes."""
    code = "import sys, foveal.config, foveal.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
