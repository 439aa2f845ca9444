"""Kimi Linear: Kimi Delta Attention in three layers of four, MLA without positions in the others, experts above the
first layer."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, KDAConfig, MLAConfig, ModelConfig, MoEConfig, RouterConfig

NAMES = common.WeightNames(
    operations={"kda": "self_attn", "mla": "self_attn", "mlp": "mlp", "moe": "block_sparse_moe"},
    renames=common.NUMBERED_EXPERTS,
    # transformers saves dense layers so.
    spellings=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
)


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(
        bos_token_id=163584,
        eos_token_id=163586,
        rms_norm_eps=1e-5,
        first_k_dense_replace=1,
        num_shared_experts=1,
        num_experts_per_token=8,
        max_position_embeddings=fields.positive("model_max_length", 1 << 20),
    )
    fields.expect("mla_use_nope", True)
    fields.skip("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "qk_head_dim")  # no layer turns anything
    attention, delta = _mla(fields), _kda(fields)
    feed_forwards = common.sparse_feed_forwards(fields, _moe(fields))
    layers = tuple(
        (BlockConfig(attention if attends else delta), BlockConfig(feed_forward))
        for attends, feed_forward in zip(_attention_layers(fields), feed_forwards, strict=True)
    )
    return common.model(fields, layers)


def _mla(fields: Fields) -> MLAConfig:
    nope, unturned = fields.positive("qk_nope_head_dim"), fields.positive("qk_rope_head_dim")
    heads = fields.positive("num_attention_heads")
    fields.expect("num_key_value_heads", heads, 1)
    return MLAConfig(
        heads=heads,
        q_lora_rank=fields.positive_or_null("q_lora_rank"),
        kv_lora_rank=fields.positive("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=unturned,
        value_dim=fields.positive("v_head_dim"),
        scale=(nope + unturned) ** -0.5,
        rope=None,
        bias=fields.flag("attention_bias"),
    )


def _kda(fields: Fields) -> KDAConfig:
    """The sizes stand in `linear_attn_config` (as released), or in fields of their own (transformers v5)."""
    settings = Fields({"model_type": fields.family} | fields.mapping("linear_attn_config"))
    settings.skip("full_attn_layers", "kda_layers")
    config = KDAConfig(
        heads=settings.positive("num_heads", fields.positive("linear_num_heads", 32)),
        head_dim=settings.positive("head_dim", fields.positive("linear_head_dim", 128)),
        conv=settings.positive("short_conv_kernel_size", fields.positive("linear_conv_kernel_dim", 4)),
        activation=common.activation(fields),
    )
    settings.finish()
    return config


def _attention_layers(fields: Fields) -> list[bool]:
    """Which layers attend, the others being recurrent: `layer_types`, or `linear_attn_config`, which counts from 1."""
    count = fields.positive("num_hidden_layers")
    types, settings = fields.names("layer_types"), fields.mapping("linear_attn_config")
    if not types and not settings:
        return [layer > 0 and layer % 4 == 0 for layer in range(count)]
    if not types:
        attends, recurrent = (_layer_numbers(settings, name, count) for name in ("full_attn_layers", "kda_layers"))
        if attends & recurrent or attends | recurrent != set(range(1, count + 1)):
            raise ValueError(
                f"config.json: 'full_attn_layers' and 'kda_layers' must share the layers 1 to {count} among them"
            )
        return [layer in attends for layer in range(1, count + 1)]
    if len(types) != count or set(types) - {"full_attention", "linear_attention"}:
        raise ValueError(
            f"config.json: 'layer_types' must be {count} of 'full_attention' or 'linear_attention', not {types}"
        )
    return [kind == "full_attention" for kind in types]


def _layer_numbers(settings: dict[str, object], name: str, count: int) -> set[int]:
    numbers = settings.get(name)
    if not isinstance(numbers, list) or not all(type(number) is int and 1 <= number <= count for number in numbers):
        raise ValueError(f"config.json: '{name}' must be a list of layers 1 to {count}, not {numbers!r}")
    return set(numbers)


def _moe(fields: Fields) -> MoEConfig:
    fields.expect("moe_router_activation_func", "sigmoid")
    fields.expect("use_grouped_topk", True)
    hidden, groups = fields.positive("moe_intermediate_size"), fields.positive("num_expert_group", 1)
    experts, per_token = fields.positive("num_experts"), fields.positive("num_experts_per_token")
    kept = min(fields.positive("topk_group", 1), groups)
    if experts % groups or per_token > experts // groups * kept:
        raise ValueError(
            f"config.json: {per_token} experts a token cannot come from {kept} of {groups} groups of {experts} experts"
        )
    router = RouterConfig(
        scoring="sigmoid",
        normalise=fields.flag("moe_renormalize", True),
        scale=fields.number("routed_scaling_factor", 2.446),
        correction_bias=True,
        groups=groups,
        groups_kept=kept,
        group_score="top2",
    )
    shared = hidden * fields.whole("num_shared_experts", 0)
    return MoEConfig(experts, per_token, hidden, router, shared_hidden=shared, activation=common.activation(fields))
