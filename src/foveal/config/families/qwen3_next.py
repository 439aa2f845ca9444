"""Qwen3-Next: the gated delta rule in three layers of four, gated attention in the others, experts in all."""

from dataclasses import replace

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import (
    BlockConfig,
    FeedForwardConfig,
    GatedDeltaConfig,
    GQAConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from foveal.config.rope import read_rope

NAMES = common.WeightNames(
    operations={"gqa": "self_attn", "gated_delta": "linear_attn", "mlp": "mlp", "moe": "mlp"},
    renames=((r"\.shared_experts\.", ".shared_expert."),),
    prediction="mtp",
)


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(num_key_value_heads=2, head_dim=256, max_position_embeddings=32768)
    attention, delta = _attention(fields), _gated_delta(fields)
    layers = tuple(
        (BlockConfig(attention if attends else delta), BlockConfig(feed_forward))
        for attends, feed_forward in zip(_attention_layers(fields), _feed_forwards(fields), strict=True)
    )
    return replace(common.model(fields, layers), centred_norms=True)


def _attention(fields: Fields) -> GQAConfig:
    bias = fields.flag("attention_bias")
    plain = common.gqa(fields, rope=False, qkv_bias=bias, o_bias=bias, qk_norm=True)
    return replace(plain, rope=read_rope(fields, plain.head_dim, partial=0.25), centred_norms=True, gated=True)


def _gated_delta(fields: Fields) -> GatedDeltaConfig:
    heads, key_heads = fields.positive("linear_num_value_heads", 32), fields.positive("linear_num_key_heads", 16)
    if heads % key_heads:
        raise ValueError(
            f"config.json: linear_num_value_heads {heads} is not a multiple of linear_num_key_heads {key_heads}"
        )
    return GatedDeltaConfig(
        heads=heads,
        key_heads=key_heads,
        key_dim=fields.positive("linear_key_head_dim", 128),
        value_dim=fields.positive("linear_value_head_dim", 128),
        conv=fields.positive("linear_conv_kernel_dim", 4),
        activation=common.activation(fields),
    )


def _attention_layers(fields: Fields) -> list[bool]:
    """Which layers attend: `layer_types` (v5), or the last of every `full_attention_interval` (v4)."""
    count, interval = fields.positive("num_hidden_layers"), fields.positive("full_attention_interval", 4)
    types = fields.names("layer_types")
    if not types:
        return [(layer + 1) % interval == 0 for layer in range(count)]
    if len(types) != count or set(types) - {"full_attention", "linear_attention"}:
        raise ValueError(
            f"config.json: 'layer_types' must be {count} of 'full_attention' or 'linear_attention', not {types}"
        )
    return [kind == "full_attention" for kind in types]


def _feed_forwards(fields: Fields) -> list[FeedForwardConfig]:
    """Experts in every `decoder_sparse_step`-th layer that is not among `mlp_only_layers`."""
    count, step = fields.positive("num_hidden_layers"), fields.positive("decoder_sparse_step", 1)
    dense_layers = fields.get("mlp_only_layers", [])
    if not isinstance(dense_layers, list) or not all(type(layer) is int for layer in dense_layers):
        raise ValueError(f"config.json: 'mlp_only_layers' must be a list of layers, not {dense_layers!r}")
    dense = common.mlp(fields)
    if fields.whole("num_experts", 512) == 0:
        fields.skip("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob")
        return [dense] * count
    experts = MoEConfig(
        experts=fields.positive("num_experts", 512),
        per_token=fields.positive("num_experts_per_tok", 10),
        hidden=fields.positive("moe_intermediate_size", 512),
        router=RouterConfig(scoring="softmax", normalise=fields.flag("norm_topk_prob", True)),
        shared_hidden=fields.positive("shared_expert_intermediate_size", 512),
        shared_gate=True,
        activation=common.activation(fields),
    )
    return [dense if layer in dense_layers or (layer + 1) % step else experts for layer in range(count)]
