"""Recurrent families and the built-in facts."""

from typing import Any

import pytest
import torch
import transformers

from foveal.config import read_config, weight_names
from foveal.config.model import KDAConfig, MambaConfig, MLAConfig, MLPConfig, MoEConfig
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
    "num_experts_per_token": 2,
    "linear_attn_config": {
        "full_attn_layers": [2, 4],
        "kda_layers": [1, 3],
        "num_heads": 2,
        "head_dim": 24,
        "short_conv_kernel_size": 3,
    },
}
MAMBA = {"model_type": "mamba", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2}


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


@pytest.mark.parametrize("raw", [KIMI, MAMBA], ids=["kimi_linear", "mamba"])
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
        (MAMBA, {"hidden_act": "relu"}, "'hidden_act' = 'relu'"),
        (MAMBA, {"intermediate_size": 64}, "'intermediate_size' = 64"),
        (MAMBA, {"rms_norm": False}, "'rms_norm' = False"),
        (MAMBA, {"state_size": 0}, "'state_size'"),
        (MAMBA, {"unheard_of": 1}, "'unheard_of' = 1"),
    ],
)
def test_refusals(raw: dict[str, Any], changes: dict[str, Any], culprit: str) -> None:
    """A field that changes the layers being ignored."""
    with pytest.raises(ValueError, match=culprit):
        read_config(raw | changes)


@pytest.mark.parametrize("raw", [KIMI, MAMBA], ids=["kimi_linear", "mamba"])
def test_checkpoint_names(raw: dict[str, Any]) -> None:
    """Names that transformers' own modules do not have: the embedding, the norms, a mixer in each layer."""
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(raw["model_type"], **fields)
    with torch.device("meta"):
        stored = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    names = weight_names(raw["model_type"])
    wanted = [names.embedding, names.final_norm, *(f"{names.layer.format(0)}.{norm}" for norm in names.norms)]
    assert {f"{name}.weight" for name in wanted} <= stored.keys()
    for kind in names.operations.keys() & {"kda", "mla", "mamba"}:
        at = f"{names.layer.format(1)}.{names.operations[kind]}."
        assert any(name.startswith(at) for name in stored)
