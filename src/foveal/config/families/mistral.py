"""Mistral 7B: Llama with a sliding window."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    # No window is a null; left out it means that of the first release.
    fields.default(bos_token_id=1, eos_token_id=2, num_key_value_heads=8, sliding_window=4096)
    fields.default(max_position_embeddings=4096 * 32)
    attention = common.gqa(fields, window=fields.positive_or_null("sliding_window"))
    layer = (BlockConfig(attention), BlockConfig(common.mlp(fields)))
    return common.model(fields, (layer,) * fields.positive("num_hidden_layers"))
