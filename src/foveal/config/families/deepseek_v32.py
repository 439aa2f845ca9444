"""DeepSeek-V3.2: V3 with DeepSeek Sparse Attention. The indexer turns half-split pairs, MLA interleaved ones."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(**common.V3_DEFAULTS, index_n_heads=64, max_position_embeddings=163840)
    return common.sparse_attention_model(fields, interleaved_index=False)
