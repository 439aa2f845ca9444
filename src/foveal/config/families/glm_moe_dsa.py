"""GLM-5: DeepSeek-V3.2's form with interleaved index rope, and layers that share a selection."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(n_group=1, topk_group=1, index_n_heads=32, rms_norm_eps=1e-5, max_position_embeddings=202752)
    fields.default(**common.V3_DEFAULTS)
    return common.sparse_attention_model(fields, interleaved_index=True)
