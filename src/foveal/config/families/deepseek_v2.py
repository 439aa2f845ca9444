"""DeepSeek-V2 and V2-Lite: MLA (with or without a query latent) and a softmax router."""

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, ModelConfig, RouterConfig

NAMES = common.LLAMA_NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(bos_token_id=1, eos_token_id=2, n_shared_experts=2, max_position_embeddings=2048)
    fields.expect("rope_interleave", True)
    attention = common.mla(fields)
    experts = common.moe(fields, _router(fields), bias=fields.flag("mlp_bias"))
    feed_forwards = common.sparse_feed_forwards(fields, experts)
    return common.model(fields, tuple((BlockConfig(attention), BlockConfig(part)) for part in feed_forwards))


def _router(fields: Fields) -> RouterConfig:
    fields.expect("scoring_func", "softmax")
    # DeepSeek's own code and transformers disagree on what True does to routed_scaling_factor; no release sets it.
    fields.expect("norm_topk_prob", False)
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    grouped = fields.get("topk_method", "greedy") == "group_limited_greedy"
    fields.skip("n_group", "topk_group")  # greedy leaves them alone
    return RouterConfig(
        scoring="softmax",
        normalise=False,
        scale=fields.number("routed_scaling_factor", 1.0),
        groups=fields.positive("n_group") if grouped else 1,
        groups_kept=fields.positive("topk_group") if grouped else 1,
        group_score="max",
        masked_score=0.0,
    )
