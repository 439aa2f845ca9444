"""Mixtral: Mistral with a softmax router over experts in every layer."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig, MoEConfig, RouterConfig

NAMES = common.WeightNames(
    operations={"gqa": "self_attn", "moe": "block_sparse_moe"},
    renames=common.NUMBERED_EXPERTS,
)


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(bos_token_id=1, eos_token_id=2, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6)
    fields.default(max_position_embeddings=4096 * 32, num_experts_per_tok=2)
    experts = MoEConfig(
        experts=fields.positive("num_local_experts"),
        per_token=fields.positive("num_experts_per_tok"),
        hidden=fields.positive("intermediate_size"),
        router=RouterConfig(scoring="softmax", normalise=True),
        activation=common.activation(fields),
    )
    attention = common.gqa(fields, window=fields.positive_or_null("sliding_window"))
    layer = (BlockConfig(attention), BlockConfig(experts))
    return common.model(fields, (layer,) * fields.positive("num_hidden_layers"))
