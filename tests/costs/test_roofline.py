"""Times, batches and prices: against sums made by hand, and properties that must hold."""

import math
import random

import pytest

from foveal.config import ModelConfig, read_config
from foveal.config.model import MoEConfig, RouterConfig
from foveal.config.released import released
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.costs.devices import DEVICES, MEASURED, Device, find_device
from foveal.costs.parameters import weight_bytes
from foveal.costs.roofline import (
    Setup,
    all_to_all_bytes,
    decode_time,
    expected_experts,
    expected_remote_devices,
    fewest_devices,
    largest_batch,
    prefill_time,
    price_per_million,
)

SLOW = Device("slow", 1e12, 1e9, {"float32": 1e12, "bfloat16": 2e12, "fp8": 4e12}, 1e8, "made up")


def model(name: str) -> ModelConfig:
    return read_config(released(name))


def setup_of(name: str, weights: str = "bfloat16", device: Device = SLOW, devices: int = 1) -> Setup:
    config, dtypes = model(name), cache_dtypes("bfloat16")
    return Setup(config, weights, dtypes, cache_cost(config, dtypes), device, devices)


def test_a_decoded_token_by_hand() -> None:
    """Llama 3 70B at 1000 tokens: every weight but the embedding and the layer norms is read once, and so are keys and
    values; a batch reads weights once and caches each its own."""
    setup = setup_of("llama-3-70b")
    moved = {name: part.bytes_moved for name, part in decode_time(setup, 1, 1000).parts.items()}
    attention = 80 * 8192 * (64 + 2 * 8 + 64) * 128 * 2
    assert moved["attention"] == attention + 1000 * 80 * 2 * 8 * 128 * 2
    assert moved["feed_forward"] == 80 * 3 * 8192 * 28672 * 2
    assert moved["lm_head"] == 128256 * 8192 * 2
    batch = decode_time(setup, 10, 1000).parts["attention"]
    assert batch.bytes_moved == attention + 10 * 1000 * 80 * 2 * 8 * 128 * 2
    assert batch.bytes_seconds == batch.bytes_moved / 1e9
    assert batch.macs == 10 * (attention // 2 + 1000 * 80 * 2 * 64 * 128)
    assert batch.macs_seconds == pytest.approx(2 * batch.macs / 2e12)
    assert batch.bound == "bandwidth" and batch.seconds == batch.bytes_seconds


def test_bound_by_arithmetic() -> None:
    """A prefill that is taken to wait for memory, and rates of another dtype than the weights'."""
    part = prefill_time(setup_of("llama-3-70b"), 4096).parts["feed_forward"]
    assert part.bound == "arithmetic" and part.seconds == pytest.approx(2 * 4096 * 80 * 3 * 8192 * 28672 / 2e12)
    half = prefill_time(setup_of("llama-3-70b", "fp8"), 4096).parts["feed_forward"]
    assert half.macs_seconds == pytest.approx(part.macs_seconds / 2)
    same = prefill_time(setup_of("llama-3-70b", "int4"), 4096).parts["feed_forward"]
    assert same.macs_seconds == part.macs_seconds and same.bytes_moved < half.bytes_moved


def test_selection_reads_only_what_it_selects() -> None:
    """Sparse attention that is charged for the whole cache, or an indexer that works while nothing is left out."""
    setup = setup_of("deepseek-v3.2")
    short, long = (decode_time(setup, 1, n).parts for n in (2048, 200_000))
    weights = 61 * 187_105_280 * 2 + 61 * (1536 + 512) * 2  # matrices and latent norms
    assert short["attention"].bytes_moved == long["attention"].bytes_moved == weights + 61 * 2048 * 576 * 2
    assert long["indexer"].bytes_moved == (61 * (2 * (12_582_912 + 917_504) + 4 * (458_752 + 256)) + 61 * 200_000 * 132)
    assert short["indexer"].bytes_moved == 61 * (2 * 917_504 + 4 * 256)


def test_states_are_read_and_written() -> None:
    """A recurrent model whose decoding grows with the context, or that leaves its state where it is."""
    setup = setup_of("mamba-2.8b")
    first, last = (decode_time(setup, 1, n).parts["recurrence"].bytes_moved for n in (1, 100_000))
    more = decode_time(setup, 2, 1).parts["recurrence"].bytes_moved
    assert first == last and more - first == 2 * setup.cache.state_bytes


def test_windows_are_read_no_further() -> None:
    """A window being charged for the whole context."""
    setup = setup_of("mistral-7b")
    at_window, beyond = (decode_time(setup, 1, n).parts["attention"].bytes_moved for n in (4096, 32768))
    assert at_window == beyond


def test_largest_batch_fills_the_memory() -> None:
    """A batch that is one too many, or could be one more; snapshots of recurrent states that are not counted."""
    for name, devices in (("llama-3-70b", 2), ("deepseek-v3.2", 16), ("jamba-1.5-large", 16)):
        setup = setup_of(name, "fp8", DEVICES["h100"], devices)
        room = 0.9 * 80e9 * devices - weight_bytes(setup.config, "fp8")
        batch, each = largest_batch(setup, 10_000), setup.cache.sequence_bytes(10_000) + setup.cache.snapshot_bytes
        assert batch * each <= room < (batch + 1) * each
    assert largest_batch(setup_of("deepseek-v3.2", "fp8", DEVICES["h100"]), 1000) == 0


def test_fewest_devices() -> None:
    """A number of devices that cannot hold the model, or over which its experts cannot be spread."""
    for name, expected in (("llama-3-70b", 2), ("mixtral-8x7b", 2), ("deepseek-v3.2", 16), ("smollm2-135m", 1)):
        setup = setup_of(name)
        weights = "fp8" if name.startswith("deepseek") else "bfloat16"
        assert fewest_devices(setup.config, weights, setup.cache, DEVICES["h100"], 1000) == expected
    many = fewest_devices(model("mixtral-8x7b"), "float32", setup_of("mixtral-8x7b").cache, DEVICES["rtx-4090"], 1000)
    assert many == 16  # 174 GiB need 9, and each of 8 experts is cut in two


def test_the_fewest_devices_hold_a_sequence_and_its_snapshots() -> None:
    """Devices that are said to hold what then does not fit: between a state and its snapshots."""
    setup = setup_of("jamba-1.5-large", device=DEVICES["h100"], devices=16)
    room = 0.9 * 80e9 * 16 - weight_bytes(setup.config, "bfloat16")
    context = int((room - setup.cache.state_bytes) / setup.cache.bytes_per_token) - 100
    assert setup.cache.sequence_bytes(context) < room and largest_batch(setup, context) == 0
    assert fewest_devices(setup.config, "bfloat16", setup.cache, DEVICES["h100"], context) == 32


def test_experts_that_a_batch_reads() -> None:
    """The expected number of different experts, against counting."""
    generator = random.Random(0)
    for experts, per_token, tokens in ((8, 2, 1), (8, 2, 3), (64, 6, 20)):
        draws = [
            len({expert for _ in range(tokens) for expert in generator.sample(range(experts), per_token)})
            for _ in range(4000)
        ]
        assert expected_experts(experts, per_token, tokens) == pytest.approx(sum(draws) / len(draws), rel=0.02)
    assert expected_experts(256, 8, 1) == 8


def test_devices_that_a_token_is_sent_to() -> None:
    """The expected number of other devices, against counting; every expert elsewhere at the limit."""
    generator = random.Random(0)
    for experts, per_token, devices in ((8, 2, 4), (64, 6, 8), (16, 2, 16)):
        held = experts // devices
        draws = []
        for _ in range(8000):
            chosen = {expert // held for expert in generator.sample(range(experts), per_token)}
            draws.append(len(chosen - {generator.randrange(devices)}))
        assert expected_remote_devices(experts, per_token, devices) == pytest.approx(sum(draws) / len(draws), rel=0.03)
    assert expected_remote_devices(256, 8, 256) == pytest.approx(255 * 8 / 256)
    assert expected_remote_devices(8, 2, 1) == 0
    with pytest.raises(ValueError, match="8 experts cannot be spread evenly over 3 devices"):
        expected_remote_devices(8, 2, 3)
    assert expected_remote_devices(100_000, 50_000, 10) == pytest.approx(9)  # binomials of this size take minutes


def test_the_head_is_not_multiplied_in_fp8() -> None:
    """The head of an fp8 checkpoint, which is stored in bfloat16, at fp8's rate."""
    head = decode_time(setup_of("deepseek-v3", "fp8"), 4000, 100).parts["lm_head"]
    assert head.bound == "arithmetic" and head.seconds == pytest.approx(2 * 4000 * 129280 * 7168 / 2e12)
    assert decode_time(setup_of("deepseek-v3", "float32"), 4000, 100).parts["lm_head"].seconds == 2 * head.seconds


def test_all_to_all_bytes() -> None:
    """One way counted only, or both in one dtype."""
    moe = MoEConfig(256, 8, 2048, RouterConfig("sigmoid", True))
    assert all_to_all_bytes(moe, 7168, 256, 1) == pytest.approx(255 * 8 / 256 * 7168 * 3)
    one, several = (decode_time(setup_of("deepseek-v3", "fp8", SLOW, n), 4, 100) for n in (1, 16))
    assert "all_to_all" not in one.parts
    exchange = several.parts["all_to_all"]
    experts = model("deepseek-v3").layers[-1][1].operation
    assert isinstance(experts, MoEConfig)
    assert exchange.bytes_moved == pytest.approx(4 * 58 * all_to_all_bytes(experts, 7168, 16, 1))
    assert exchange.seconds == pytest.approx(exchange.bytes_moved / (16 * 1e8))


def test_price() -> None:
    """Hours, seconds and millions mixed up."""
    assert price_per_million(1000, 3.6) == pytest.approx(1.0)


def test_rates_of_what_a_device_lacks() -> None:
    """fp8 on a device without it being free, or refused."""
    a100 = DEVICES["a100"]
    assert a100.rate("fp8") == a100.rate("bfloat16") == 312e12 > a100.rate("float32")
    assert DEVICES["h100"].rate("fp8") > DEVICES["h100"].rate("bfloat16")
    assert a100.rate("int8") == 624e12


def test_this_machine() -> None:
    """A measurement that is no number, or takes more than some seconds; and a device that nobody knows."""
    device = find_device(MEASURED)
    assert 1e8 < device.bandwidth_bytes_per_second < 1e14 and 1e8 < device.rate("bfloat16") < 1e16
    assert device.memory_bytes > 1e8 and device.link_bytes_per_second is None
    for name in ("mixtral-8x7b", "llama-3-70b"):
        with pytest.raises(ValueError, match="this machine has no link to others: devices must be 1, not 2"):
            setup_of(name, device=device, devices=2)
    alone = setup_of("deepseek-v3", device=device)
    assert fewest_devices(alone.config, "fp8", alone.cache, device, 1000) == 1
    with pytest.raises(ValueError, match="no device 'tpu'"):
        find_device("tpu")


def test_a_step_is_the_sum_of_its_parts() -> None:
    """Parts that are forgotten in the total; more devices that make it slower where nothing is exchanged."""
    one, two = (decode_time(setup_of("llama-3-70b", devices=n), 3, 500) for n in (1, 2))
    assert math.isclose(one.seconds, sum(part.seconds for part in one.parts.values()))
    assert two.seconds == pytest.approx(one.seconds / 2)
