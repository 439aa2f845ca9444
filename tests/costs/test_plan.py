"""The record as a whole: what is in it, what it is made from, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from foveal.config import ModelConfig, read_config
from foveal.config.released import released, released_names
from foveal.costs import Plan, Request, find_device, make_plan
from foveal.costs.macs import running_macs

REQUEST = Request(32768, find_device("h100"), price_per_hour=2.0)


def model(name: str) -> ModelConfig:
    return read_config(released(name))


@pytest.fixture(scope="module")
def sparse() -> dict[str, Any]:
    """DeepSeek-V3.2's record, through JSON and back."""
    plan = make_plan("deepseek-v3.2", model("deepseek-v3.2"), REQUEST)
    record: dict[str, Any] = json.loads(json.dumps(plan.as_dict()))
    return record


@pytest.mark.parametrize("name", released_names())
def test_every_built_in_model(name: str) -> None:
    """A kind of layer that some part of the plan cannot count; numbers that JSON has no word for."""
    plan = make_plan(name, model(name), REQUEST)
    text = json.dumps(plan.as_dict(), allow_nan=False)
    assert json.loads(text)["model"] == name
    assert plan.speed.fits and plan.speed.decode.seconds > 0


def test_published_numbers_in_the_record(sparse: dict[str, Any]) -> None:
    """Keys that lead elsewhere than their names say."""
    lines = sparse["macs"]["per_token"]
    assert lines["feed_forward"] == 24_284_495_872 and lines["dense_fixed"] == 36_624_596_992
    assert lines["sparse_fixed"] == 54_874_079_232 and lines["sparse_per_context_token"] == 499_712
    assert f"{sparse['sparse']['ratio_published']['2000']:.4f}" == "1.0421"
    assert f"{sparse['sparse']['ratio_actual']['2000']:.4f}" == "1.0345"
    assert sparse["sparse"]["ratio_limit"] == 1 / 17 and sparse["sparse"]["topk"] == 2048
    assert "32768" in sparse["sparse"]["ratio_actual"]
    assert sparse["cache"]["bytes_per_token_by_part"] == {"latents": 61 * 1152, "index_keys": 61 * 132}
    assert sparse["latent_forms"]["expansion_macs"] == 32768 * 128 * 512 * 256
    assert sparse["latent_forms"]["decode_absorbed"] is True
    assert sparse["parameters"]["total"] == sum(part["total"] for part in sparse["parameters"]["by_part"].values())


def test_what_runs_is_said(sparse: dict[str, Any]) -> None:
    """A total that is not that of its parts, or of another form than it says."""
    for step in ("decode", "prefill"):
        runs = sparse["macs"][f"{step}_runs"]
        assert runs["form"] == "sparse"
        assert runs["total"] == sum(runs["by_part"].values()) == sparse["macs"][step]["sparse"]["total"]
        assert set(sparse["macs"][step]) == {"expanded", "absorbed", "masked", "sparse"}
    dense = make_plan("x", model("llama-3-70b"), REQUEST).as_dict()
    assert set(dense["macs"]["decode"]) == {"dense"}
    assert dense["sparse"] is None and dense["latent_forms"] is None


def test_money(sparse: dict[str, Any]) -> None:
    """The price of one device for many, or of a second for an hour."""
    speed = sparse["speed"]
    assert speed["devices"] == 16 and speed["batch"] == speed["largest_batch"]
    decode = speed["decode"]
    assert decode["tokens_per_second"] == pytest.approx(speed["batch"] / decode["seconds"])
    assert speed["decode_price_per_million_tokens"] == pytest.approx(32 / 3600 / decode["tokens_per_second"] * 1e6)
    assert speed["prefill_price_per_million_tokens"] == pytest.approx(
        32 / 3600 / speed["prefill"]["tokens_per_second"] * 1e6
    )
    free = make_plan("x", model("deepseek-v3.2"), replace(REQUEST, price_per_hour=None)).speed
    assert free.decode_price_per_million is None


def plan(name: str, **changes: Any) -> Plan:
    return make_plan(name, model(name), replace(REQUEST, **changes))


def test_every_part_of_a_request_counts() -> None:
    """An option that is accepted and ignored."""
    base = plan("deepseek-v3.2")
    assert plan("deepseek-v3.2", context=65536).arithmetic.decode != base.arithmetic.decode
    assert plan("deepseek-v3.2", batch=3).speed.decode.batch == 3
    assert plan("deepseek-v3.2", weight_dtype="int4").memory.weight_bytes < base.memory.weight_bytes
    assert plan("deepseek-v3.2", kv_cache_dtype="fp8").memory.cache.bytes_per_token == 61 * (656 + 132)
    assert plan("deepseek-v3.2", index_dtype="bf16").memory.cache.bytes_per_token == 61 * (1152 + 256)
    assert plan("deepseek-v3.2", context=32700, page_tokens=1024).memory.cache.sequence_pages(32700) == 32
    assert plan("deepseek-v3.2", devices=32).speed.devices == 32
    slower = plan("deepseek-v3.2", device=find_device("a100"), devices=16).speed
    assert slower.decode.seconds > plan("deepseek-v3.2", devices=16, batch=slower.decode.batch).speed.decode.seconds


def test_weights_say_what_a_model_runs_in() -> None:
    """A float32 checkpoint whose caches stay in float32 when it runs in bfloat16, or the other way round."""
    wide, narrow = (plan("llama-3-70b", weight_dtype=dtype).memory for dtype in ("float32", "int8"))
    assert (
        wide.cache.bytes_per_token
        == 2 * narrow.cache.bytes_per_token
        == 2 * plan("llama-3-70b").memory.cache.bytes_per_token
    )
    assert plan("mamba-2.8b").memory.dtypes.keys_values == "float32"
    assert plan("mamba-2.8b", weight_dtype="bfloat16").memory.dtypes.keys_values == "bfloat16"


def test_what_does_not_fit_is_said() -> None:
    """A throughput promised for a batch that no memory holds."""
    large = plan("llama-3-70b", devices=2, batch=10_000).speed
    assert not large.fits and large.decode.batch == 10_000 > large.largest_batch
    none = plan("deepseek-v3", devices=1).speed
    assert not none.fits and none.largest_batch == 0 and none.decode.batch == 1


def test_notes() -> None:
    """Limits that a reader should know of and is not told."""
    assert "8192" in plan("llama-3-70b").notes[0]
    assert any("saves nothing" in note for note in plan("deepseek-v3.2", context=2048).notes)
    assert not any("saves nothing" in note for note in plan("deepseek-v3.2", context=2049).notes)
    mixed = read_config(
        {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "max_position_embeddings": 100_000,
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 1,
        }
    )
    assert any("window" in note for note in make_plan("x", mixed, REQUEST).notes)
    assert plan("deepseek-v2").notes == ()


def test_index_keys_alone_below_top_k() -> None:
    """An indexer that is charged in full while selection is skipped, or not at all."""
    below, beyond = (running_macs(model("deepseek-v3.2"), 1, n) for n in (2048, 2049))
    assert below["indexer"] == 61 * 7168 * 128
    assert beyond["indexer"] == 851_509_248 + 499_712 * 2049


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"context": -5}, "not -5"),
        ({"batch": 0}, "batch"),
        ({"devices": 0}, "devices"),
        ({"page_tokens": 0}, "page size"),
        ({"price_per_hour": -1.0}, "price per hour"),
        ({"price_per_hour": float("nan")}, "price per hour"),
        ({"weight_dtype": "int3"}, "'int3'"),
        ({"kv_cache_dtype": "int3"}, "'int3'"),
        ({"index_dtype": "int3"}, "'int3'"),
        ({"devices": 7}, "256 experts cannot be spread evenly over 7 devices"),
    ],
)
def test_refusals(changes: dict[str, Any], culprit: str) -> None:
    """Nonsense being planned."""
    with pytest.raises(ValueError, match=culprit):
        plan("deepseek-v3.2", **changes)


def test_neither_torch_nor_numpy() -> None:
    """A plan that waits for torch: all of costs, but what reads weights, must do without."""
    code = (
        "import sys; from foveal.config import read_config; from foveal.config.released import released;"
        "from foveal.costs import *;"
        "make_plan('x', read_config(released('deepseek-v3.2')), Request(32768, find_device('h100'))).as_dict();"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_device_without_others() -> None:
    """A model that is too large for this machine being refused, or spread over machines that are not there."""
    lonely = replace(find_device("h100"), link_bytes_per_second=None)
    speed = plan("deepseek-v3.2", device=lonely).speed
    assert (speed.devices, speed.fits, speed.largest_batch) == (1, False, 0)
    with pytest.raises(ValueError, match="devices must be 1, not 4"):
        plan("llama-3-70b", device=lonely, devices=4)
