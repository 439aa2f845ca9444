"""DeepSeek-V3, R1 and V3.1: MLA and the router without auxiliary loss."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(**common.V3_DEFAULTS, max_position_embeddings=4096)
    if "num_nextn_predict_layers" not in fields.raw:
        fields.default(num_mtp_layers=1)  # Moonlight's config says that there are none
    attention = common.mla(fields, interleaved=fields.flag("rope_interleave", True))
    feed_forwards = common.sparse_feed_forwards(fields, common.moe(fields, common.noaux_router(fields)))
    return common.model(fields, tuple((BlockConfig(attention), BlockConfig(part)) for part in feed_forwards))
