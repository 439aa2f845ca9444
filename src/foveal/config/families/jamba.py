"""Jamba: one attention layer without rope in eight, Mamba in the others, experts in every second."""

import math

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, MambaConfig, ModelConfig, MoEConfig, RouterConfig

NAMES = common.WeightNames(
    final_norm="model.final_layernorm",
    norms=("input_layernorm", "pre_ff_layernorm"),
    operations={"gqa": "self_attn", "mamba": "mamba", "mlp": "feed_forward", "moe": "feed_forward"},
    renames=((r"\.gate\.weight", ".router.weight"),),
)


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(bos_token_id=1, eos_token_id=2, num_key_value_heads=8, max_position_embeddings=262144)
    attention, mamba, dense = common.gqa(fields, rope=False), _mamba(fields), common.mlp(fields)
    experts = MoEConfig(
        experts=fields.positive("num_experts", 16),
        per_token=fields.positive("num_experts_per_tok", 2),
        hidden=dense.hidden,
        router=RouterConfig(scoring="softmax", normalise=False),
        activation=dense.activation,
    )
    attention_layers = _pattern(fields, "attn_layer_period", 8, "attn_layer_offset", 4)
    expert_layers = _pattern(fields, "expert_layer_period", 2, "expert_layer_offset", 1)
    fields.skip("layer_types", "layers_block_type", "layers_num_experts")
    layers = tuple(
        (
            BlockConfig(attention if attends else mamba),
            BlockConfig(experts if has_experts and experts.experts > 1 else dense),
        )
        for attends, has_experts in zip(attention_layers, expert_layers, strict=True)
    )
    return common.model(fields, layers)


def _pattern(fields: Fields, period: str, default_period: int, offset: str, default_offset: int) -> list[bool]:
    step, start = fields.positive(period, default_period), fields.whole(offset, default_offset)
    if start >= step:
        raise ValueError(f"config.json: '{offset}' = {start} must be below '{period}' = {step}")
    return [layer % step == start for layer in range(fields.positive("num_hidden_layers"))]


def _mamba(fields: Fields) -> MambaConfig:
    hidden = fields.positive("hidden_size")
    fields.expect("mamba_inner_layernorms", True)
    rank = fields.get("mamba_dt_rank", "auto")
    return MambaConfig(
        inner=fields.positive("mamba_expand", 2) * hidden,
        state=fields.positive("mamba_d_state", 16),
        conv=fields.positive("mamba_d_conv", 4),
        dt_rank=math.ceil(hidden / 16) if rank == "auto" else fields.positive("mamba_dt_rank"),
        conv_bias=fields.flag("mamba_conv_bias", True),
        proj_bias=fields.flag("mamba_proj_bias"),
        activation=common.activation(fields),
    )
