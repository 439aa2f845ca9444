"""What the cache costs: the plan's figures against the tensors that are really allocated; copies and states by slot."""

from typing import Any

import pytest
import torch
import transformers
from oracle import FAMILIES

from foveal.cache.layouts import StateLayout, StateSlots
from foveal.cache.store import CacheStore, plan_cache
from foveal.config import read_config
from foveal.config.formats import index_key_bytes, latent_bytes


def config_of(name: str, **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(name.split("-")[0], **FAMILIES[name] | changes)
    return read_config(config.to_dict())


def test_record_sizes() -> None:
    """The formats' sizes for DeepSeek-V3.2: 656 and 132 bytes; other dims in general."""
    assert latent_bytes(512, 64, "fp8") == 656
    assert latent_bytes(512, 64, "bfloat16") == 1152
    assert latent_bytes(200, 8, "fp8") == 200 + 8 + 16
    assert index_key_bytes(128, "fp8") == index_key_bytes(128, "int8") == 132
    for dtype in ("fp8", "int8"):
        with pytest.raises(ValueError, match=f"{dtype} index keys .* not 96"):
            index_key_bytes(96, dtype)


@pytest.mark.parametrize(
    ("name", "latents", "index"),
    [
        ("llama", "auto", "auto"),
        ("jamba", "auto", "auto"),
        ("mamba2", "auto", "auto"),
        ("qwen3_next", "auto", "auto"),
        ("kimi_linear", "fp8", "auto"),
        ("deepseek_v32", "auto", "bf16"),
        ("deepseek_v32", "fp8", "fp8"),
        ("deepseek_v32", "auto", "int8"),
        ("glm_moe_dsa", "fp8", "fp8"),
    ],
)
def test_plan_equals_allocation(name: str, latents: str, index: str) -> None:
    """A plan that promises less memory than the tensors take."""
    config = config_of(name)
    plan = plan_cache(config, torch.bfloat16, latents, index)
    store = CacheStore(plan, pages=3, slots=2)
    blocks = store._blocks()
    paged = sum(layout.pages.nbytes for block in blocks for layout in block.paged)
    states = sum(state.nbytes for block in blocks if block.state for state in block.state.states)
    assert (paged, states) == (3 * plan.page_bytes, 2 * plan.slot_bytes)
    assert plan.has_slots == (name in ("jamba", "mamba2", "qwen3_next", "kimi_linear"))


def test_automatic_dtypes() -> None:
    """`auto` quantising index keys in a float32 model, or not in a bfloat16 one; latents never unasked."""
    config = config_of("deepseek_v32")
    single, half = plan_cache(config, torch.float32), plan_cache(config, torch.bfloat16)
    assert (single.latent_dtype, single.index_dtype) == (torch.float32, torch.float32)
    assert (half.latent_dtype, half.index_dtype) == (torch.bfloat16, "fp8")


def test_shared_selections_have_no_index_keys() -> None:
    """Index keys being cached for layers without an indexer."""
    config = config_of("glm_moe_dsa")
    own = sum(layer[0].indexer is not None for layer in config.layers)
    assert own < len(config.layers)
    blocks = CacheStore(plan_cache(config, torch.float32), 1, 0)._blocks()
    assert sum(block.index is not None for block in blocks) == own


@pytest.mark.parametrize("name", ["llama", "deepseek_v32", "jamba"])
@pytest.mark.parametrize("fp8", [False, True])
def test_only_the_null_page_is_set(name: str, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting with the whole budget of memory touched, or with a null page that holds NaN."""
    empty = torch.empty

    def dirty(shape: tuple[int, ...], **options: Any) -> torch.Tensor:
        memory = empty(shape, **options)
        memory.view(torch.uint8).fill_(0xFF)  # NaN in every float format
        return memory

    monkeypatch.setattr(torch, "empty", dirty)
    latents = "fp8" if fp8 and name == "deepseek_v32" else "auto"
    store = CacheStore(plan_cache(config_of(name), torch.bfloat16, latents, "fp8" if fp8 else "bf16"), 3, 3)
    tensors = [layout.pages for layout in store._paged()]
    tensors += [state for block in store._blocks() if block.state for state in block.state.states]
    for tensor in tensors:
        assert not tensor[0].view(torch.uint8).any() and (tensor[1:].contiguous().view(torch.uint8) == 0xFF).all()


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype"),
        ({"index_dtype": "int3"}, "index_dtype"),
    ],
)
def test_refusals(options: dict[str, str], culprit: str) -> None:
    """A dtype that is not known being taken for another."""
    with pytest.raises(ValueError, match=culprit):
        plan_cache(config_of("deepseek_v32"), torch.float32, **options)
    with pytest.raises(ValueError, match="does not have"):
        plan_cache(config_of("llama"), torch.float32, "fp8")


@pytest.mark.parametrize("name", ["llama", "deepseek_v32", "jamba", "kimi_linear", "mamba2"])
def test_copies(name: str) -> None:
    """A fork's copy that forgets a layer, a part of a page, or a state."""
    store = CacheStore(plan_cache(config_of(name), torch.bfloat16), pages=4, slots=4)
    tensors = [layout.pages for layout in store._paged()]
    tensors += [state for block in store._blocks() if block.state for state in block.state.states]
    for tensor in tensors:
        tensor.copy_(torch.randint(0, 100, tensor.shape))
    store.copy_pages([(1, 3)])
    store.copy_slots([(1, 3)])
    assert all(torch.equal(tensor[1], tensor[3]) and not torch.equal(tensor[1], tensor[2]) for tensor in tensors)


@pytest.mark.parametrize("slots", [(2,), (1, 2, 3), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_states_by_slot(slots: tuple[int, ...], fresh: bool) -> None:
    """Slots that do not lie in order, states of a neighbour, or a store that changes where a sequence begins."""
    layout = StateLayout(5, [((2, 3), torch.float32), ((4,), torch.bfloat16)], "cpu")
    for state in layout.states:
        state.copy_(torch.randn(state.shape))
    before = [state.clone() for state in layout.states]
    starts = (*(False for _ in slots[1:]), fresh)
    given = StateSlots(slots, slots, starts)
    for read, stored in zip(layout.read(given), before, strict=True):
        assert torch.equal(read[:-1], stored[list(slots[:-1])])
        assert torch.equal(read[-1], torch.zeros_like(read[-1]) if fresh else stored[slots[-1]])
    assert all(map(torch.equal, layout.states, before))
    new = [torch.randn(len(slots), *state.shape[1:]) for state in before]
    layout.write(given, new)
    for state, stored, written in zip(layout.states, before, new, strict=True):
        stored[list(slots)] = written.to(stored.dtype)
        assert torch.equal(state, stored)
