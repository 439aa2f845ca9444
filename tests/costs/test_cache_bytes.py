"""Cache bytes against what the engine's cache plans, allocates and hands out."""

from typing import Any

import pytest
import torch
import transformers
from oracle import FAMILIES

from foveal.cache import PAGE_SIZE
from foveal.cache.manager import CacheManager
from foveal.cache.store import CacheStore, plan_cache
from foveal.config import ModelConfig, read_config
from foveal.config.released import released
from foveal.config.streaming import with_streaming
from foveal.costs.cache_bytes import CacheCost, CacheDtypes, cache_cost, cache_dtypes

MLA = [name for name in FAMILIES if name.startswith(("deepseek", "glm"))]


def config_of(name: str) -> ModelConfig:
    return read_config(transformers.AutoConfig.for_model(name.split("-")[0], **FAMILIES[name]).to_dict())


def cost_of(config: ModelConfig, dtype: str, *options: str) -> CacheCost:
    return cache_cost(config, cache_dtypes(dtype, *options))


def allocated(config: ModelConfig, dtype: torch.dtype, *options: str) -> tuple[int, int]:
    """Bytes of one page, and of one slot, as the tensors are."""
    store = CacheStore(plan_cache(config, dtype, *options), pages=1, slots=1)
    blocks = [block for layer in store.layers for block in layer if block is not None]
    pages = sum(layout.pages.nbytes for block in blocks for layout in block.paged)
    return pages, sum(state.nbytes for block in blocks if block.state for state in block.state.states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, dtype: str) -> None:
    """A plan that promises less memory than the tensors take, in any family."""
    config, cost = config_of(name), cost_of(config_of(name), dtype)
    plan = plan_cache(config, getattr(torch, dtype))
    assert (cost.page_bytes, cost.state_bytes, cost.window) == (plan.page_bytes, plan.slot_bytes, plan.window)
    assert (cost.page_bytes, cost.state_bytes) == allocated(config, getattr(torch, dtype))


@pytest.mark.parametrize(
    "options", [("fp8", "fp8"), ("fp8", "bf16"), ("auto", "int8"), ("bf16", "float32"), ("auto", "fp8")]
)
@pytest.mark.parametrize("name", MLA)
def test_cache_dtypes(name: str, options: tuple[str, str]) -> None:
    """A cache dtype that the plan and the engine understand differently."""
    config = config_of(name)
    for dtype in ("float32", "bfloat16"):
        assert cost_of(config, dtype, *options).page_bytes == allocated(config, getattr(torch, dtype), *options)[0]


@pytest.mark.parametrize("name", ["deepseek-v3.2", "llama-3-70b", "jamba-1.5-large", "mixtral-8x7b", "glm-5"])
def test_released_models(name: str) -> None:
    """The same at full size."""
    config = read_config(released(name))
    cost, plan = cost_of(config, "bfloat16"), plan_cache(config, torch.bfloat16)
    assert (cost.page_bytes, cost.state_bytes) == (plan.page_bytes, plan.slot_bytes)


@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 100, 4096])
@pytest.mark.parametrize("sinks", [0, 4, 64, 70])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 200, 1000])
def test_pages_that_a_sequence_holds(tokens: int, sinks: int, window: int | None) -> None:
    """An off-by-one in the last page, in what a window lets go of, or in what sinks keep."""
    config = read_config(released("llama-3-70b"))
    if window is not None:
        config = with_streaming(config, sinks, window)
    manager = CacheManager(40, prefix_caching=False, window=window, sinks=sinks)
    ids = list(range(tokens))
    manager.admit("a", ids)
    assert manager.reserve("a", tokens)
    manager.commit("a", ids, tokens)
    held = manager.usage.pages_in_use
    cost = cost_of(config, "bfloat16")
    assert cost.window == window
    assert cost.sequence_pages(tokens) == held
    assert cost.sequence_bytes(tokens) == held * PAGE_SIZE * 80 * 2 * 8 * 128 * 2


def test_hybrids_by_their_layers() -> None:
    """Layers that keep nothing a token being counted, or a state that grows: Jamba's 9 attention layers of 72, and Kimi
    Linear's 7 latents of 27."""
    jamba = cost_of(read_config(released("jamba-1.5-large")), "bfloat16")
    assert jamba.bytes_per_token == 9 * 2 * 8 * 128 * 2
    assert jamba.state_bytes == 63 * (3 * 16384 * 2 + 16384 * 16 * 4)
    kimi = cost_of(read_config(released("kimi-linear-48b")), "bfloat16")
    assert kimi.bytes_per_token == 7 * 576 * 2
    assert kimi.state_bytes == 20 * (3 * 3 * 4096 * 2 + 32 * 128 * 128 * 4)
    mamba = cost_of(read_config(released("mamba-2.8b")), "float32")
    assert mamba.bytes_per_token == 0 and mamba.sequence_bytes(1) == mamba.sequence_bytes(10**6) == mamba.state_bytes


def test_jamba_at_256k() -> None:
    """The published sizes of the attention cache at 256K (arXiv 2408.12570): 4 GiB for 1.5-Mini, 9 GiB for
    1.5-Large; and float32 states beside it that do not grow."""
    large = released("jamba-1.5-large")
    mini = large | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 14336}
    for raw, attention, state in ((mini, 4, 15.3), (large, 9, 68.9)):
        cost = cost_of(read_config(raw), "bfloat16")
        assert cost.sequence_bytes(1 << 18) - cost.state_bytes == attention << 30
        assert cost.state_bytes / (1 << 20) == pytest.approx(state, abs=0.05)


@pytest.mark.parametrize("name", ["kimi_linear", "mamba"])
def test_states_of_recurrent_families(name: str) -> None:
    """States of another shape than transformers keeps (which holds one input of the convolution more)."""
    small = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 4}
    kimi = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "pad_token_id": 0,
        "linear_attn_config": {
            "full_attn_layers": [2],
            "kda_layers": [1, 3, 4],
            "num_heads": 2,
            "head_dim": 24,
            "short_conv_kernel_size": 3,
        },
    }
    raw = small | (kimi if name == "kimi_linear" else {})
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **raw))
    with torch.inference_mode():
        output = model(torch.arange(20)[None], use_cache=True)
    layers = (output.cache_params if name == "mamba" else output.past_key_values).layers
    recurrent = [layer for layer in layers if hasattr(layer, "recurrent_states")]
    inputs = sum(layer.conv_states[0][..., 1:].numel() for layer in recurrent)
    states = sum(layer.recurrent_states[0].numel() for layer in recurrent)
    config = read_config(raw | {"model_type": name})
    assert cost_of(config, "bfloat16").state_bytes == 2 * inputs + 4 * states
    latents = [layer for layer in layers if layer not in recurrent]
    cached = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in latents)
    assert cost_of(config, "bfloat16").bytes_per_token == 2 * cached


def test_what_is_still_read() -> None:
    """Windows in some layers only: pages stay, although those layers never read them again."""
    config = config_of("qwen2")  # a window of 20 in all layers but the first
    cost = cost_of(config, "float32")
    assert cost.window is None
    row = 2 * 2 * 16 * 4
    assert cost.needed_bytes(100) == row * 100 + 2 * row * 20
    assert cost.sequence_bytes(100) == 3 * row * 128


def test_waste_of_the_last_page() -> None:
    """The expected waste against the mean over lengths: (page - 1) / 2 tokens a sequence."""
    config = read_config(released("llama-3-70b"))
    for page in (1, 16, 64, 256):
        cost = cache_cost(config, CacheDtypes("bfloat16", "bfloat16", "fp8"), page)
        lengths = range(1, 4 * page + 1)
        empty = [cost.sequence_pages(n) * page - n for n in lengths]
        assert cost.expected_waste_tokens == sum(empty) / len(empty)
    assert cache_cost(config, cache_dtypes("bfloat16"), 64).expected_waste(1024) == 31.5 / 1055.5


@pytest.mark.parametrize(("sinks", "window"), [(0, 1000), (4, 1020), (70, 333)])
def test_waste_behind_a_window(sinks: int, window: int) -> None:
    """A share of pages that were given back long ago."""
    cost = cost_of(with_streaming(read_config(released("llama-3-70b")), sinks, window), "bfloat16")
    lengths = range(64 * 1000, 64 * 1001)
    places = sum(cost.sequence_pages(n) * 64 for n in lengths) / 64
    assert cost.expected_waste(64_000) == pytest.approx(31.5 / places)
    assert cost.expected_waste(100) == 31.5 / 131.5


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [(("int3",), "int3"), (("bfloat16", "int4"), "int4"), (("bfloat16", "auto", "int5"), "int5")],
)
def test_refusals(arguments: Any, culprit: str) -> None:
    """A dtype that is not known being taken for another."""
    with pytest.raises(ValueError, match=culprit):
        cache_dtypes(*arguments)
    odd = read_config(released("deepseek-v3.2") | {"index_head_dim": 96})
    with pytest.raises(ValueError, match="not 96"):
        cost_of(odd, "bfloat16")
