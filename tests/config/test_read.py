"""Reading config.json: both spellings, defaults, and refusals that name the culprit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from oracle import FAMILIES

from foveal.config import read_config
from foveal.config.model import GQAConfig, MambaConfig, MLAConfig, MoEConfig, RopeConfig

MLA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 163840,
    "q_lora_rank": 24,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK_V32 = MLA | {
    "model_type": "deepseek_v32",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "seq_aux": True,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
# Nothing but sizes: everything else is left to the family's defaults.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "vocab_size": 100,
}
MLA_SIZES = SIZES | {
    "num_key_value_heads": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 32,
}
MINIMAL: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "mixtral": SIZES | {"num_local_experts": 6},
    "jamba": SIZES | {"num_hidden_layers": 16},
    "deepseek_v2": MLA_SIZES | {"num_experts_per_tok": 4},
    "deepseek_v3": MLA_SIZES,
    "deepseek_v32": MLA_SIZES,
    "glm_moe_dsa": MLA_SIZES,
}


def test_deepseek_v32_as_released() -> None:
    """The released form of DeepSeek-V3.2 (v4 spelling): its scale, layers, router and index rope."""
    config = read_config(DEEPSEEK_V32)
    attention = config.layers[0][0].operation
    assert isinstance(attention, MLAConfig)
    assert attention.scale == pytest.approx(0.135234, abs=1e-6)  # 192^-0.5 times m^2 (sparse-attention literature)
    assert attention.rope.interleaved and attention.rope.scaling.attention_factor == 1.0
    assert all(layer[0].indexer is not None for layer in config.layers)
    indexer = config.layers[0][0].indexer
    assert indexer is not None and not indexer.rope.interleaved
    assert [isinstance(layer[1].operation, MoEConfig) for layer in config.layers] == [False, True, True]
    assert config.fp8_blocks is not None and config.mtp_layers == 1 and config.dtype == "bfloat16"


def test_prediction_layers_that_are_not_there() -> None:
    """A config that says that there are none (Moonlight's), read as one that says nothing, where V3 has one."""
    raw = {key: value for key, value in DEEPSEEK_V32.items() if not key.startswith(("index_", "num_nextn"))}
    raw["model_type"] = "deepseek_v3"
    assert read_config(raw).mtp_layers == 1
    assert [read_config(raw | {"num_nextn_predict_layers": count}).mtp_layers for count in (0, 1, 2)] == [0, 1, 2]
    assert read_config(raw | {"num_mtp_layers": 0}).mtp_layers == 0


def test_v5_spelling_says_the_same() -> None:
    """`rope_parameters` and `mlp_layer_types` being read differently from `rope_theta` and `first_k_dense_replace`."""
    new = {key: value for key, value in DEEPSEEK_V32.items() if key not in ("rope_theta", "rope_scaling")}
    new.pop("first_k_dense_replace")
    new["rope_parameters"] = YARN | {"rope_type": "yarn", "rope_theta": 10000}
    new["mlp_layer_types"] = ["dense", "sparse", "sparse"]
    assert read_config(new) == read_config(DEEPSEEK_V32)


def glm(layers: int, **fields: Any) -> list[int]:
    raw = MLA | {"model_type": "glm_moe_dsa", "num_hidden_layers": layers, "first_k_dense_replace": 3} | fields
    return [index for index, layer in enumerate(read_config(raw).layers) if layer[0].indexer]


def test_shared_selections() -> None:
    """The off-by-one of `index_topk_freq`: GLM-5.2's 78 layers have indexers in {0, 1, 2, 6, 10, ..., 74}."""
    assert glm(78, index_topk_freq=4, index_skip_topk_offset=3) == [0, 1, *range(2, 75, 4)]
    assert glm(5) == [0, 1, 2, 3, 4]
    assert glm(4, index_topk_pattern="FSSF") == [0, 3]
    assert glm(3, indexer_types=["full", "shared", "full"]) == [0, 2]
    assert glm(2, layer_types=["deepseek_sparse_attention"] * 2) == [0, 1]


def test_glm_index_rope_is_interleaved() -> None:
    """DeepSeek's and GLM's index rope mixed up (invisible below top-k tokens, ruinous beyond)."""
    raw = MLA | {"model_type": "glm_moe_dsa"}
    for fields, interleaved in (({}, True), ({"indexer_rope_interleave": False}, False)):
        indexer = read_config(raw | fields).layers[0][0].indexer
        assert indexer is not None and indexer.rope.interleaved == interleaved


def test_windows() -> None:
    """A window where the config asks for none, or the wrong layers windowed."""

    def windows(**fields: Any) -> list[int | None]:
        layers = read_config(LLAMA | fields).layers
        return [layer[0].operation.window for layer in layers if isinstance(layer[0].operation, GQAConfig)]

    assert windows(model_type="mistral") == [4096, 4096]
    assert windows(model_type="mistral", sliding_window=None) == [None, None]
    assert windows(model_type="qwen2", sliding_window=8, max_window_layers=1) == [None, None]
    assert windows(model_type="qwen2", sliding_window=8, max_window_layers=1, use_sliding_window=True) == [None, 8]
    types = ["sliding_attention", "full_attention"]
    assert windows(model_type="qwen3", sliding_window=8, use_sliding_window=True, layer_types=types) == [8, None]


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2", "qwen3"])
@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(family: str, window: int) -> None:
    """A window that leaves a query without keys: not a number anywhere."""
    raw = MINIMAL[family] | {"model_type": family, "sliding_window": window, "use_sliding_window": False}
    with pytest.raises(ValueError, match="'sliding_window'"):
        read_config(raw)


@pytest.mark.parametrize("family", MINIMAL)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    """A default that is not the family's: a released config may rely on any of them."""
    import transformers

    full = transformers.AutoConfig.for_model(family, **MINIMAL[family]).to_dict()
    assert read_config(MINIMAL[family] | {"model_type": family}) == read_config(full)


def rope_of(raw: dict[str, Any]) -> RopeConfig:
    """The rope of the first layer."""
    operation = read_config(raw).layers[0][0].operation
    assert isinstance(operation, GQAConfig | MLAConfig) and operation.rope is not None
    return operation.rope


PLAIN = {"rope_type": "default", "rope_theta": 1e6}
STRETCHED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": STRETCHED, "rope_parameters": PLAIN},
        {"rope_scaling": PLAIN, "rope_parameters": STRETCHED},
        {"rope_scaling": STRETCHED | {"rope_theta": 1e6}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": STRETCHED, "rope_parameters": STRETCHED | {"rope_theta": 1e6, "rope_type": "yarn"}},
        {"rope_scaling": STRETCHED, "rope_theta": 1e6},
        {"rope_parameters": STRETCHED | {"rope_theta": 1e6}},
    ],
)
def test_both_spellings_of_rope_together(fields: dict[str, Any]) -> None:
    """A hand-added `rope_scaling` that hides the theta in `rope_parameters`, or the other way round."""
    rope = rope_of(LLAMA | fields)
    assert (rope.theta, rope.scaling.kind, rope.scaling.factor) == (1e6, "yarn", 4.0)


@pytest.mark.parametrize("change", [{"factor": 2.0}, {"rope_theta": 5e5}])
def test_spellings_of_rope_that_contradict_each_other(change: dict[str, Any]) -> None:
    """One of two different scalings, or thetas, being taken at random."""
    both = {
        "rope_scaling": STRETCHED | {"rope_theta": 1e6},
        "rope_parameters": STRETCHED | {"rope_theta": 1e6} | change,
    }
    with pytest.raises(ValueError, match=r"'rope_scaling' = .* contradicts 'rope_parameters' = "):
        read_config(LLAMA | both)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 128),
        ({"type": "linear", "factor": 2.0}, 256),
        ({"type": "dynamic", "factor": 2.0}, 256),
        ({"type": "yarn", "factor": 4.0}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 128),
        ({"type": "yarn", "original_max_position_embeddings": 32}, 128),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 128),
    ],
)
def test_positions(scaling: dict[str, Any] | None, longest: int) -> None:
    """A stretched model that refuses the context it was stretched to, or that is stretched twice."""
    assert read_config(LLAMA | {"rope_scaling": scaling}).max_positions == longest


def test_positions_of_deepseek_v32() -> None:
    """The released `max_position_embeddings`, which is 40 times the original length already, times 40 again."""
    assert read_config(DEEPSEEK_V32).max_positions == 163840


def test_yarn_without_a_factor() -> None:
    """A KeyError where the factor follows from the two lengths."""
    yarn = {key: value for key, value in YARN.items() if key != "factor"}
    assert read_config(DEEPSEEK_V32 | {"rope_scaling": yarn}) == read_config(DEEPSEEK_V32)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_an_original_length_that_scales_nothing(kind: str) -> None:
    """Refused, though transformers v4 documented it for dynamic rope, and no version reads it."""
    rope = {"type": kind, "factor": 2.0}
    stated = rope | {"original_max_position_embeddings": 64}
    assert read_config(LLAMA | {"rope_scaling": stated}) == read_config(LLAMA | {"rope_scaling": rope})


def test_jamba_pattern() -> None:
    """Attention or experts on the wrong layers."""
    config = read_config(LLAMA | {"model_type": "jamba", "num_hidden_layers": 16})
    mixers = [isinstance(layer[0].operation, MambaConfig) for layer in config.layers]
    assert [index for index, is_mamba in enumerate(mixers) if not is_mamba] == [4, 12]
    assert [isinstance(layer[1].operation, MoEConfig) for layer in config.layers] == [False, True] * 8


def fp8(blocks: Any) -> dict[str, Any]:
    """The field of a checkpoint that is quantised in `blocks`."""
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": blocks}}


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_act": "swish2"}, "'hidden_act' = 'swish2'"),
        ({"logit_scale": 0.5}, "'logit_scale' = 0.5"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "tail": 1}}, "'tail'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config' = 'gptq'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_scaling": "yarn"}, "'rope_scaling' must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor' must be a number"),
        ({"rope_theta": "1e6"}, "'rope_theta' must be a number"),
        ({"rope_theta": -1}, "'rope_theta'"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number"),
        ({"attention_bias": "false"}, "'attention_bias' must be true or false"),
        ({"eos_token_id": "2"}, "'eos_token_id'"),
        ({"is_causal": False}, "'is_causal' = False"),
        ({"unheard_of": False}, "'unheard_of' = False"),
        ({"unheard_of": 0}, "'unheard_of' = 0"),
        ({"use_mrope": True}, "'use_mrope' = True"),
        ({"model_type": "mistral", "attention_bias": True}, "'attention_bias' = True"),
        ({"model_type": "qwen2", "layer_types": [["full_attention"], 1]}, "'layer_types' must be a list of strings"),
        (fp8([128]), "'weight_block_size'"),
        (fp8(128), "'weight_block_size'"),
        (fp8([128, "128"]), "'weight_block_size'"),
        ({"num_hidden_layers": 10**30}, "'num_hidden_layers' must not be above 10000; it is a number above 10^18"),
        ({"num_hidden_layers": 10**9}, "it is 1000000000"),
        ({"hidden_size": 10**400}, "'hidden_size' must not be above"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a number"),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' must be a number"),
        ({"rope_theta": float("inf")}, "'rope_theta' must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "'factor' must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e300}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": -7}}, "must be above 0"),
        ({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 20}, "20 experts a token"),
        ({"model_type": "jamba", "num_experts": 16, "num_experts_per_tok": 17}, "17 experts a token"),
    ],
)
def test_refusals(fields: dict[str, Any], culprit: str) -> None:
    """A field that changes results being ignored, or an error that does not say which it was."""
    with pytest.raises(ValueError, match=re.escape(culprit)):
        read_config(LLAMA | fields)


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"rope_interleave": False}, "'rope_interleave' = False"),
        ({"topk_method": "group_limited_greedy", "n_group": None}, "'n_group'"),
        ({"topk_method": "group_limited_greedy", "topk_group": None}, "'topk_group'"),
        ({"q_lora_rank": 0}, "'q_lora_rank'"),
    ],
)
def test_refusals_of_deepseek_v2(fields: dict[str, Any], culprit: str) -> None:
    """A rope that V2 does not have being ignored, or a TypeError for groups that are not there."""
    with pytest.raises(ValueError, match=culprit):
        read_config(MLA | {"model_type": "deepseek_v2"} | fields)


def test_a_query_latent_is_stated() -> None:
    """A config that leaves `q_lora_rank` out being read as V2-Lite's null: releases write one or the other."""
    raw = {key: value for key, value in MLA.items() if key != "q_lora_rank"} | {"model_type": "deepseek_v2"}
    with pytest.raises(ValueError, match="lacks 'q_lora_rank'"):
        read_config(raw)
    assert read_config(raw | {"q_lora_rank": None}).layers


def test_inert_fields_are_accepted() -> None:
    """A released config being refused for what changes nothing."""
    inert = {"use_cache": True, "architectures": ["X"], "_name_or_path": "a/b", "router_jitter_noise": 0.0}
    empty = {"unheard_of": None, "mlp_only_layers": [], "nothing": {}, "blank": ""}
    old = {
        "pretraining_tp": 2,
        "max_sequence_length": 16384,
        "n_ctx": 256,
        "seq_length": 256,
        "rope_scaling": {"type": "default", "original_max_position_embeddings": 64},
    }
    assert read_config(LLAMA | old) == read_config(LLAMA)
    off = {"use_sliding_window": False, "use_mrope": False, "is_llama_config": False, "tie_encoder_decoder": False}
    assert read_config(LLAMA | inert | empty | off | {"is_causal": True}) == read_config(LLAMA)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reads_what_transformers_writes(name: str) -> None:
    """A field that transformers writes for a family being refused."""
    import transformers

    config = transformers.AutoConfig.for_model(name.split("-")[0], **FAMILIES[name])
    assert read_config(config.to_dict()).family == name.split("-")[0]


def test_files(tmp_path: Path) -> None:
    """A directory, a file, broken JSON and a missing file."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == read_config(LLAMA)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nowhere")
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(1 << 40)  # a file with nothing in it
    with pytest.raises(ValueError, match="larger than 64 MiB"):  # not read whole, which would take all memory
        read_config(tmp_path / "model.safetensors")
