"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window on the upper layers where asked for."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(num_key_value_heads=32, sliding_window=4096, max_position_embeddings=32768)
    feed_forward = BlockConfig(common.mlp(fields))
    layers = tuple(
        (BlockConfig(common.gqa(fields, qkv_bias=True, window=window)), feed_forward)
        for window in common.windows(fields)
    )
    return common.model(fields, layers)
