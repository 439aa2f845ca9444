"""Qwen3 (dense): RMSNorm on each head's query and key, a head_dim of its own, no biases unless asked for."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(num_key_value_heads=32, sliding_window=4096, head_dim=128, max_position_embeddings=32768)
    bias = fields.flag("attention_bias")
    feed_forward = BlockConfig(common.mlp(fields))
    layers = tuple(
        (BlockConfig(common.gqa(fields, qkv_bias=bias, o_bias=bias, qk_norm=True, window=window)), feed_forward)
        for window in common.windows(fields)
    )
    return common.model(fields, layers)
