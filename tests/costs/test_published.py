"""DeepSeek-V3.2's arithmetic to every digit that is published, and where common accounts of it are loose."""

import pytest

from foveal.config import ModelConfig, read_config
from foveal.config.model import MLAConfig
from foveal.config.released import released
from foveal.costs import apply_variant
from foveal.costs.absorption import expansion_macs
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.costs.macs import decode_formula, decode_macs, prefill_crossover, prefill_macs


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """The released model: 61 layers."""
    return read_config(released("deepseek-v3.2"))


def test_parts_of_a_decoded_token(config: ModelConfig) -> None:
    """A part that is counted twice, or at another width."""
    formula = decode_formula(config)
    assert formula.feed_forward == 24_284_495_872
    assert formula.lm_head == 926_679_040
    assert formula.attention_fixed == 11_413_422_080
    assert formula.attention_per_context_token == 8_495_104
    assert formula.attention_selected == 17_397_972_992
    assert formula.indexer_fixed == 851_509_248
    assert formula.indexer_per_context_token == 499_712
    assert formula.dense_fixed == 36_624_596_992
    assert formula.sparse_fixed == 54_874_079_232
    assert formula.sparse_per_context_token == 499_712
    assert formula.recurrence == 0 and formula.attention_per_window_token == {}


@pytest.mark.parametrize("context", [1, 2000, 2048, 2049, 128_000])
def test_the_lines_are_the_counts(config: ModelConfig, context: int) -> None:
    """A formula that says something else than the function that counts."""
    formula = decode_formula(config)
    dense = formula.dense_fixed + formula.attention_per_context_token * context
    assert sum(decode_macs(config, context, "absorbed").values()) == dense
    sparse = formula.dense_fixed + formula.indexer_fixed + formula.indexer_per_context_token * context
    sparse += formula.attention_per_context_token * min(context, 2048)
    assert sum(decode_macs(config, context, "sparse").values()) == sparse
    assert formula.ratio_actual(context) == pytest.approx(sparse / dense, rel=1e-12)


@pytest.mark.parametrize(
    ("context", "ratio"),
    [
        (2000, "1.0421"),
        (2300, "0.9975"),
        (4000, "0.8055"),
        (16000, "0.3644"),
        (64000, "0.1497"),
        (128000, "0.1057"),
        (512000, "0.0708"),
    ],
)
def test_published_ratios(config: ModelConfig, context: int, ratio: str) -> None:
    """Sparse over dense with attention to 2048 tokens, however few there are."""
    assert f"{decode_formula(config).ratio_published(context):.4f}" == ratio


def test_ratio_below_top_k_and_at_the_limit(config: ModelConfig) -> None:
    """Selection is min(n, k): 1.0345 at 2000 tokens; the published figure attends to tokens that are not there."""
    formula = decode_formula(config)
    assert f"{formula.ratio_actual(2000):.4f}" == "1.0345"
    assert formula.ratio_actual(4000) == formula.ratio_published(4000)
    assert f"{formula.limit_ratio:.4f}" == "0.0588" and formula.limit_ratio == 1 / 17
    assert all(formula.ratio_actual(n) > 1 for n in (1, 100, 2048))


def test_where_it_begins_to_pay(config: ModelConfig) -> None:
    """A crossover that is not where the two costs meet."""
    formula = decode_formula(config)
    assert formula.crossover_context == 2282.5 and formula.pays_from == 2283
    assert formula.ratio_actual(2282) > 1 > formula.ratio_actual(2283)
    shortest = prefill_crossover(config)
    assert shortest is not None

    def cheaper(tokens: int) -> bool:
        totals = {form: sum(prefill_macs(config, tokens, form).values()) for form in ("expanded", "absorbed", "sparse")}
        return totals["sparse"] < min(totals["expanded"], totals["absorbed"])

    assert cheaper(shortest) and not cheaper(shortest - 1)
    assert prefill_crossover(read_config(released("deepseek-v3"))) is None
    never = apply_variant(config, "dsa:1000000000")
    assert prefill_crossover(never) is None


def test_a_shared_selection_costs_no_indexer() -> None:
    """Layers that reuse a selection being charged for an indexer, or for the whole context."""
    raw = released("glm-5") | {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    every, some = (decode_formula(read_config(fields)) for fields in (released("glm-5"), raw))
    assert every.indexer_per_context_token == 78 * 32 * 128 and some.indexer_per_context_token == 21 * 32 * 128
    assert some.indexer_fixed * 78 == every.indexer_fixed * 21
    assert some.attention_selected == every.attention_selected
    assert some.sparse_per_context_token == some.indexer_per_context_token


def elements(config: ModelConfig, variant: str | None = None) -> int:
    """Numbers that one layer keeps of a token."""
    config = apply_variant(config, variant) if variant else config
    return cache_cost(config, cache_dtypes("bfloat16")).rows[0].elements_per_token


def test_keys_and_values_a_token() -> None:
    """MHA 32768, GQA in groups of four 8192, MQA 256 and a latent of 512, with 128 heads of 128; the row that is cached
    holds 64 numbers of rope key more, so that 98.24 % are saved and not 98.44 %."""
    config = read_config(released("deepseek-v3"))
    assert (elements(config, "mha"), elements(config, "gqa:32"), elements(config, "mqa")) == (32768, 8192, 256)
    latent = config.layers[0][0].operation
    assert isinstance(latent, MLAConfig) and latent.kv_lora_rank == 512
    assert f"{100 * (1 - latent.kv_lora_rank / 32768):.2f}" == "98.44"
    assert elements(config) == 576
    assert f"{100 * (1 - elements(config) / 32768):.2f}" == "98.24"


def test_where_common_accounts_are_loose(config: ModelConfig) -> None:
    """The figures that docs/costs.md puts beside them."""
    rows = cache_cost(config, cache_dtypes("bfloat16", "fp8")).rows
    assert [row.bytes_per_token for row in rows[:2]] == [656, 132]  # not 129: the scale is a float32
    per_layer = cache_cost(apply_variant(read_config(released("deepseek-v3")), "mha"), cache_dtypes("bfloat16")).rows
    assert per_layer[0].bytes_per_token == 65536 and len(per_layer) == 61
    assert f"{32000 * 65536 / 2**30:.2f}" == "1.95"
    latent = config.layers[0][0].operation
    assert isinstance(latent, MLAConfig)
    assert expansion_macs(latent, 32000) == 536_870_912_000
    assert (latent.heads * latent.nope_dim) ** 0.5 == 128


def test_deepseek_v2_against_its_baseline() -> None:
    """93.3 % needs a cache of six bits; the architecture alone saves 82.2 % against DeepSeek 67B's eight heads."""
    costs = [
        cache_cost(read_config(released(name)), cache_dtypes("bfloat16")) for name in ("deepseek-v2", "deepseek-67b")
    ]
    latent, baseline = (sum(row.elements_per_token for row in cost.rows) for cost in costs)
    assert f"{100 * (1 - latent / baseline):.1f}" == "82.2"
    assert f"{100 * (1 - latent * 6 / 8 / (baseline * 2)):.1f}" == "93.3"
