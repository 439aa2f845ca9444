"""Mistral 7B: Llama with a sliding window."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    # Absent means 4096 (the original release); null means none.
    window = fields.get("sliding_window") if "sliding_window" in fields.raw else 4096
    fields.skip("sliding_window")
    layer = (BlockConfig(common.gqa(fields, window=window)), BlockConfig(common.mlp(fields)))
    return common.model(fields, (layer,) * fields.positive("num_hidden_layers"))
