"""Merging weights, and the forms of latent attention."""

import pytest

from foveal.config import read_config
from foveal.config.model import MLAConfig, RopeConfig
from foveal.config.released import released
from foveal.costs.absorption import Absorption, absorbed_pays, mla_absorptions, most_absorbed_queries
from foveal.costs.attention import mla_macs


def test_merging_against_a_count_of_products() -> None:
    """2 m d_c (d + n) mixed up with 2 m d n."""
    pair = Absorption(rows=3, inner=7, rank=2, outer=5)
    assert pair.separate_flops == 2 * (3 * 7 * 2) + 2 * (3 * 2 * 5) == 2 * 3 * 2 * (7 + 5)
    assert pair.merged_flops == 2 * 3 * 7 * 5
    assert not pair.merging_pays
    assert Absorption(1, 7, 4, 5).merging_pays and not Absorption(1, 8, 4, 8).merging_pays  # 64 = 64: nothing gained


def test_deepseek_v3_does_not_merge() -> None:
    """The common advice to merge W_UQ with W_UK: their product is three times as large as the two."""
    latent = read_config(released("deepseek-v3")).layers[0][0].operation
    assert isinstance(latent, MLAConfig)
    keys = mla_absorptions(latent, 7168)["keys"]
    assert (keys.merged_numbers, keys.separate_numbers) == (128 * 1536 * 512, 128 * 128 * (1536 + 512))
    assert not any(pair.merging_pays for pair in mla_absorptions(latent, 7168).values())


@pytest.mark.parametrize("context", [1, 2, 50, 1000, 32768])
def test_the_most_queries_that_absorb(context: int) -> None:
    """A bisection that ends one beside the border."""
    latent = read_config(released("deepseek-v3")).layers[0][0].operation
    assert isinstance(latent, MLAConfig)
    most = most_absorbed_queries(latent, context)
    assert all(absorbed_pays(latent, queries, context) for queries in {1, most} - {0} if queries <= most)
    assert most == context or not absorbed_pays(latent, most + 1, context)


def test_a_latent_narrower_than_heads_always_absorbs() -> None:
    """Expansion being preferred where it costs more a pair and an expansion besides."""
    narrow = MLAConfig(4, None, 8, 16, 4, 16, 1.0, RopeConfig(4, 1e4))
    assert most_absorbed_queries(narrow, 100) == 100
    macs = mla_macs(narrow, 100, 100)
    assert macs["absorbed"] < macs["expanded"]
