"""Variants: the attention is exchanged, everything else stays."""

import pytest

from foveal.config import ModelConfig, read_config
from foveal.config.model import GQAConfig, MambaConfig, MLAConfig
from foveal.config.released import released
from foveal.costs import apply_variant
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.costs.macs import decode_formula


def model(name: str, variant: str = "") -> ModelConfig:
    config = read_config(released(name))
    return apply_variant(config, variant) if variant else config


def bytes_per_token(config: ModelConfig) -> int:
    return cache_cost(config, cache_dtypes("bfloat16")).bytes_per_token


def test_per_head_variants_of_grouped_queries() -> None:
    """Groups that change the queries, or heads that do not."""
    for variant, groups in (("mha", 64), ("gqa:8", 8), ("gqa:16", 16), ("mqa", 1)):
        config = model("llama-3-70b", variant)
        mixer = config.layers[0][0].operation
        assert isinstance(mixer, GQAConfig) and (mixer.heads, mixer.kv_heads) == (64, groups)
        assert bytes_per_token(config) == 80 * 2 * groups * 128 * 2
    assert model("llama-3-70b", "gqa:8") == model("llama-3-70b")


def test_a_latent_instead_of_heads_and_back() -> None:
    """A conversion that changes the width of heads, or forgets the rope key in the cache."""
    config = model("llama-3-70b", "mla")
    mixer = config.layers[0][0].operation
    assert isinstance(mixer, MLAConfig)
    assert (mixer.heads, mixer.nope_dim, mixer.value_dim, mixer.kv_lora_rank) == (64, 128, 128, 512)
    assert bytes_per_token(config) == 80 * 576 * 2
    assert bytes_per_token(model("llama-3-70b", "mla:256")) == 80 * 320 * 2
    assert bytes_per_token(model("deepseek-v3", "mha")) == 61 * 2 * 128 * 128 * 2
    assert config.layers[0][1] == model("llama-3-70b").layers[0][1]


def test_an_indexer_makes_dense_sparse() -> None:
    """V3 with an indexer being something else than V3.2, or an indexer that a model has being replaced."""
    made, real = decode_formula(model("deepseek-v3", "dsa")), decode_formula(model("deepseek-v3.2"))
    assert made == real
    smaller = decode_formula(model("deepseek-v3.2", "dsa:1024"))
    assert smaller.attention_selected * 2 == real.attention_selected
    assert smaller.indexer_fixed == real.indexer_fixed
    llama = decode_formula(model("llama-3-70b", "dsa:1024"))
    assert llama.attention_selected == 80 * 1024 * 2 * 64 * 128
    assert llama.indexer_fixed == 80 * (8192 * 64 * 128 + 8192 * 128 + 8192 * 64)


def test_joined_variants() -> None:
    """The second of two variants being forgotten."""
    config = model("llama-3-70b", "mla+dsa:1024")
    assert config.index_topk == 1024 and isinstance(config.layers[0][0].operation, MLAConfig)
    windowed = model("deepseek-v3", "gqa:8+window:4096")
    assert cache_cost(windowed, cache_dtypes("bfloat16")).window == 4096
    indexer = model("deepseek-v3.2", "gqa:8").layers[0][0].indexer
    assert indexer is not None and indexer.query_dim == 7168  # there is no query latent any more


def test_hybrids_keep_their_recurrent_layers() -> None:
    """A variant that touches layers that do not attend."""
    before, after = model("jamba-1.5-large"), model("jamba-1.5-large", "mqa")
    assert [isinstance(block.operation, MambaConfig) for block in before.blocks] == [
        isinstance(block.operation, MambaConfig) for block in after.blocks
    ]
    assert bytes_per_token(after) * 8 == bytes_per_token(before)


@pytest.mark.parametrize(
    ("name", "variant", "culprit"),
    [
        ("llama-3-70b", "moe", "'moe' is not known"),
        ("llama-3-70b", "gqa", "'gqa' is not known"),
        ("llama-3-70b", "gqa:0", "'gqa:0' is not known"),
        ("llama-3-70b", "gqa:-8", "'gqa:-8' is not known"),
        ("llama-3-70b", "mqa:2", "'mqa:2' is not known"),
        ("llama-3-70b", "window:", "'window:' is not known"),
        ("llama-3-70b", "mla+", "'' is not known"),
        ("llama-3-70b", "gqa:7", "'gqa:7' does not fit"),
        ("llama-3-70b", "gqa:128", "'gqa:128' does not fit"),
        ("deepseek-v3", "window:4096", "'window:4096' does not fit latent attention"),
        ("llama-3-70b", "dsa+window:4096", "a layer selects tokens already"),
        ("mistral-7b", "mla", "window of 4096"),
        ("mistral-7b", "dsa", "window of 4096"),
        ("mamba-2.8b", "mqa", "'mqa' needs attention layers"),
    ],
)
def test_refusals(name: str, variant: str, culprit: str) -> None:
    """A misspelt or impossible variant being taken for something."""
    with pytest.raises(ValueError, match=culprit):
        model(name, variant)


def test_heads_as_wide_as_their_values() -> None:
    """GLM-5's values cut from 256 to the 192 of its keys: per head it would keep 32768 numbers, 57 times the latent's
    576 (transformers#48761)."""
    assert bytes_per_token(model("glm-5", "mha")) == 78 * (32768 * 2 + 132)
    assert bytes_per_token(model("deepseek-v3", "mha")) == 61 * 32768 * 2


def test_a_gate_is_not_lost() -> None:
    """Qwen3-Next's gates left out of a latent variant without a word, and its parameters with them."""
    gated = read_config(
        {
            "model_type": "qwen3_next",
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
        }
    )
    with pytest.raises(ValueError, match="'mla' does not fit: attention is gated"):
        apply_variant(gated, "mla")
    one = apply_variant(gated, "gqa:1").layers[3][0].operation
    assert isinstance(one, GQAConfig) and one.gated and one.kv_heads == 1
