"""Llama 1 to 3 and what shares their form (SmolLM2, TinyLlama, ...)."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(bos_token_id=1, eos_token_id=2, max_position_embeddings=2048)
    fields.expect("rope_interleaved", False)
    bias = fields.flag("attention_bias")
    attention = common.gqa(fields, qkv_bias=bias, o_bias=bias)
    feed_forward = common.mlp(fields, bias=fields.flag("mlp_bias"))
    layer = (BlockConfig(attention), BlockConfig(feed_forward))
    return common.model(fields, (layer,) * fields.positive("num_hidden_layers"))
