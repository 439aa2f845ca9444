"""Recurrent families and the built-in facts."""

import math
from typing import Any

import pytest
import torch
import transformers

from foveal.config import read_config, weight_names
from foveal.config.model import GatedDeltaConfig, GQAConfig, KDAConfig, MambaConfig, MLAConfig, MLPConfig, MoEConfig
from foveal.config.released import released, released_names

KIMI: dict[str, Any] = {
    "model_type": "kimi_linear",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_experts": 8,
    "linear_attn_config": {
        "full_attn_layers": [2, 4],
        "kda_layers": [1, 3],
        "num_heads": 2,
        "head_dim": 24,
        "short_conv_kernel_size": 3,
    },
}
MAMBA = {"model_type": "mamba", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2}
MAMBA2 = MAMBA | {"model_type": "mamba2", "num_heads": 8, "head_dim": 16}
NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
ALL = {raw["model_type"]: raw for raw in (KIMI, MAMBA, MAMBA2, NEXT)}


@pytest.mark.parametrize("name", released_names())
def test_built_in_facts_are_read(name: str) -> None:
    """A built-in model that no reader takes, or without a source."""
    facts = released(name)
    assert str(facts["_source"]).startswith("https://huggingface.co/")
    assert read_config(facts).layers


def test_an_unknown_name() -> None:
    """A path of this package being opened by a name like ../model."""
    with pytest.raises(ValueError, match=r"'\.\./facts/glm-5'"):
        released("../facts/glm-5")


def test_kimi_linear_as_released() -> None:
    """Layers counted from 0 instead of 1, rope where there is none, a dense layer with experts."""
    config = read_config(released("kimi-linear-48b"))
    mixers = [layer[0].operation for layer in config.layers]
    latents = {number + 1: mixer for number, mixer in enumerate(mixers) if isinstance(mixer, MLAConfig)}
    assert list(latents) == [4, 8, 12, 16, 20, 24, 27]
    assert latents[4].rope is None and latents[4].q_lora_rank is None and latents[4].scale == 192**-0.5
    assert mixers[0] == KDAConfig(heads=32, head_dim=128, conv=4)
    assert isinstance(config.layers[0][1].operation, MLPConfig)
    experts = config.layers[1][1].operation
    assert isinstance(experts, MoEConfig)
    assert (experts.experts, experts.per_token, experts.shared_hidden) == (256, 8, 1024)
    assert experts.router.correction_bias and experts.router.scale == 2.446
    assert config.max_positions == 1 << 20


def test_mamba_as_released() -> None:
    """Norms that only Jamba has, or a limit on positions that nothing counts."""
    config = read_config(released("mamba-2.8b"))
    assert config.layers == config.layers[:1] * 64 and len(config.layers[0]) == 1
    assert config.layers[0][0].operation == MambaConfig(inner=5120, state=16, conv=4, dt_rank=160, norms=False)
    assert config.tied_embeddings and config.norm_eps == 1e-5 and config.max_positions > 1 << 25


def test_codestral_mamba_as_released() -> None:
    """The one big Mamba-2 being refused for what transformers and others do not read."""
    said = {"norm_before_gate": True, "rms_norm": True, "intermediate_size": 128, "time_step_limit": [0.0, math.inf]}
    initial = {"time_step_scale": 1.0, "time_step_init_scheme": "random", "time_step_rank": 4, "time_step_min": 0.001}
    assert read_config(MAMBA2 | said | initial) == read_config(MAMBA2)


@pytest.mark.parametrize("raw", ALL.values(), ids=ALL)
def test_what_a_config_leaves_out_is_what_transformers_takes(raw: dict[str, Any]) -> None:
    """A default that is not the family's, and the fields that transformers v5 writes instead of a dictionary."""
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    full = transformers.AutoConfig.for_model(raw["model_type"], **fields).to_dict()
    full.pop("linear_attn_config", None)
    assert read_config(raw) == read_config(full)


def test_kimi_layers_without_a_pattern() -> None:
    """The layers that attend where a config does not say: transformers' choice."""
    raw = {key: value for key, value in KIMI.items() if key != "linear_attn_config"} | {"num_hidden_layers": 9}
    layers = read_config(raw).layers
    assert [number for number, layer in enumerate(layers) if isinstance(layer[0].operation, MLAConfig)] == [4, 8]


@pytest.mark.parametrize(
    ("raw", "changes", "culprit"),
    [
        (KIMI, {"mla_use_nope": False}, "'mla_use_nope' = False"),
        (KIMI, {"mla_use_output_gate": True}, "'mla_use_output_gate' = True"),
        (KIMI, {"moe_router_activation_func": "softmax"}, "'moe_router_activation_func' = 'softmax'"),
        (KIMI, {"num_experts_per_token": 9}, "9 experts a token"),
        (KIMI, {"linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2, 3]}}, "'full_attn_layers' and"),
        (KIMI, {"linear_attn_config": {"full_attn_layers": [0], "kda_layers": [1]}}, "'full_attn_layers' must be"),
        (KIMI, {"linear_attn_config": KIMI["linear_attn_config"] | {"gate": 1}}, "'gate' = 1"),
        (KIMI, {"layer_types": ["full_attention"]}, "'layer_types' must be 4"),
        (KIMI, {"num_key_value_heads": 2}, "'num_key_value_heads' = 2"),
        (MAMBA, {"hidden_act": "tanh"}, "'hidden_act' = 'tanh'"),
        (MAMBA, {"intermediate_size": 64}, "'intermediate_size' = 64"),
        (MAMBA, {"rms_norm": False}, "'rms_norm' = False"),
        (MAMBA, {"state_size": 0}, "'state_size'"),
        (MAMBA, {"unheard_of": 1}, "'unheard_of' = 1"),
        (MAMBA2, {"num_heads": 7}, "7 heads of 16 in 8 groups"),
        (MAMBA2, {"n_groups": 3}, "8 heads of 16 in 3 groups"),
        (MAMBA2, {"time_step_limit": [0.0]}, "'time_step_limit' must be two numbers"),
        (MAMBA2, {"time_step_limit": 0.5}, "'time_step_limit' must be two numbers"),
        (MAMBA2, {"intermediate_size": 64}, "'intermediate_size' = 64"),
        (NEXT, {"linear_num_value_heads": 24}, "linear_num_value_heads 24"),
        (NEXT, {"partial_rotary_factor": 1.5}, "'partial_rotary_factor'"),
        (NEXT, {"partial_rotary_factor": 0.5, "rope_scaling": {"partial_rotary_factor": 0.25}}, "'partial_rotary"),
        (NEXT, {"layer_types": ["full_attention"]}, "'layer_types' must be 4"),
        (NEXT, {"mlp_only_layers": "all"}, "'mlp_only_layers'"),
        (NEXT, {"use_sliding_window": True}, "'use_sliding_window' = True"),
    ],
)
def test_refusals(raw: dict[str, Any], changes: dict[str, Any], culprit: str) -> None:
    """A field that changes the layers being ignored."""
    with pytest.raises(ValueError, match=culprit):
        read_config(raw | changes)


@pytest.mark.parametrize("raw", ALL.values(), ids=ALL)
def test_checkpoint_names(raw: dict[str, Any]) -> None:
    """Names that transformers' own modules do not have: the embedding, the norms, a mixer in each layer."""
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(raw["model_type"], **fields)
    with torch.device("meta"):
        stored = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    names = weight_names(raw["model_type"])
    wanted = [names.embedding, names.final_norm, *(f"{names.layer.format(0)}.{norm}" for norm in names.norms)]
    assert {f"{name}.weight" for name in wanted} <= stored.keys()
    for kind in names.operations.keys() & {"kda", "mla", config.model_type}:
        at = f"{names.layer.format(1)}.{names.operations[kind]}."
        assert any(name.startswith(at) for name in stored)


def test_qwen3_next_as_released() -> None:
    """Sizes, a share of turned dimensions, or a pattern other than the release's (Qwen3-Next-80B-A3B)."""
    raw = NEXT | {"num_hidden_layers": 8, "head_dim": 256, "partial_rotary_factor": 0.25, "full_attention_interval": 4}
    config = read_config(raw | {"rope_theta": 10000000, "rope_scaling": None, "norm_topk_prob": True})
    mixers = [layer[0].operation for layer in config.layers]
    assert [place for place, mixer in enumerate(mixers) if isinstance(mixer, GQAConfig)] == [3, 7]
    attention, delta, experts = mixers[3], mixers[0], config.layers[0][1].operation
    assert isinstance(attention, GQAConfig) and attention.rope and attention.gated and attention.qk_norm
    assert (attention.rope.dim, attention.rope.theta) == (64, 1e7)
    assert delta == GatedDeltaConfig(heads=32, key_heads=16, key_dim=128, value_dim=128, conv=4)
    assert isinstance(experts, MoEConfig) and experts.shared_gate and experts.router.normalise
    assert config.centred_norms and attention.centred_norms
