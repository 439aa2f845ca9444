"""Hybrids that no family has, by pattern alone: sparse latent attention beside recurrences of every kind."""

import pytest
import torch

from foveal.cache.layouts import StateSlots
from foveal.cache.store import CacheStore, plan_cache
from foveal.config.model import (
    BlockConfig,
    GatedDeltaConfig,
    GQAConfig,
    IndexerConfig,
    KDAConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    RecurrentConfig,
    RopeConfig,
    S4DConfig,
)
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.costs.parameters import total_parameters
from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.train.initial import initialise

ROPE = RopeConfig(dim=8, theta=10000.0)
LATENT = MLAConfig(4, 24, 16, 8, 8, 8, 16**-0.5, ROPE)
SPARSE = BlockConfig(LATENT, IndexerConfig(heads=8, head_dim=16, topk=6, query_dim=24, rope=ROPE))
SPARSE_GQA = BlockConfig(
    GQAConfig(4, 2, 8, 8**-0.5, ROPE), IndexerConfig(heads=8, head_dim=16, topk=6, query_dim=32, rope=ROPE)
)
RECURRENT: dict[str, RecurrentConfig] = {
    "mamba": MambaConfig(inner=48, state=4, conv=4, dt_rank=3),
    "s4d": S4DConfig(channels=32, state=5),
    "mamba2": Mamba2Config(heads=4, head_dim=12, state=6, groups=2, conv=3),
    "gated delta": GatedDeltaConfig(heads=4, key_heads=2, key_dim=6, value_dim=10, conv=4),
    "kda": KDAConfig(heads=3, head_dim=10, conv=4),
}
LENGTH = 37


def model(recurrent: RecurrentConfig, attention: BlockConfig) -> ModelConfig:
    feed_forward = BlockConfig(MLPConfig(48))
    layers = ((BlockConfig(recurrent), feed_forward), (attention, feed_forward), (BlockConfig(recurrent),))
    return ModelConfig("any", 100, 32, layers, 1e-6, 256)


@pytest.mark.parametrize("attention", [SPARSE, BlockConfig(LATENT), SPARSE_GQA], ids=["dsa", "mla", "sparse gqa"])
@pytest.mark.parametrize("name", RECURRENT)
def test_in_pieces_through_the_cache(name: str, attention: BlockConfig) -> None:
    """A state or a page of one layer that another takes for its own, or that a chunk forgets."""
    config = model(RECURRENT[name], attention)
    decoder = Decoder(config)
    initialise(decoder, seed=2)
    for block in decoder.modules():
        if hasattr(block, "k_norm") and hasattr(block, "wk"):
            torch.nn.init.normal_(block.k_norm.weight)
            torch.nn.init.normal_(block.k_norm.bias)
    ids = torch.randint(0, 100, (LENGTH,), generator=torch.Generator().manual_seed(1))
    plan = plan_cache(config, torch.float32)
    cost = cache_cost(config, cache_dtypes("float32"))
    assert (plan.page_bytes, plan.slot_bytes) == (cost.page_bytes, cost.state_bytes)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == total_parameters(config).total
    store, start, parts = CacheStore(plan, pages=3, slots=3), 0, []
    with torch.inference_mode():
        for count in (11, 1, 1, 17, 7):
            slots = StateSlots((2,), (2,), (start == 0,))
            piece = ids[start : start + count].tolist()
            parts.append(decoder.step(Batch.paged([piece], [start], [[1, 2]], slots=slots), store).logits_LV)
            start += count
        whole = decoder(ids[None])[0]
    assert (torch.cat(parts) - whole).abs().max() < 1e-4 * whole.abs().max()
