"""What several families share: a family module is `read(fields) -> ModelConfig` plus `NAMES`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foveal.config.fields import Fields
from foveal.config.model import (
    BlockConfig,
    FeedForwardConfig,
    Fp8Blocks,
    GQAConfig,
    IndexerConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    RouterConfig,
)
from foveal.config.rope import mscale_scale, read_rope, rope_settings


@dataclass(frozen=True)
class WeightNames:
    """Where a checkpoint keeps what. Inside an operation the library uses DeepSeek's and Llama's own names
    (`q_proj`, `kv_a_proj_with_mqa`, `experts.3.up_proj`); `renames` lists where a family differs: what `re.sub` is to
    replace, and by what."""

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    operations: Mapping[str, str] = field(
        default_factory=lambda: {"gqa": "self_attn", "mla": "self_attn", "mlp": "mlp", "moe": "mlp"}
    )
    indexer: str = "self_attn.indexer"
    prediction: str | None = None
    """Where multi-token-prediction layers stand, if not behind the others."""
    renames: tuple[tuple[str, str], ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    """Names that some checkpoints have instead: what `re.sub` is to replace in them, and by what."""


LLAMA_NAMES = WeightNames()
# Routed experts' layers as Mixtral calls them.
NUMBERED_EXPERTS = (
    (r"(experts\.\d+)\.gate_proj\.", r"\1.w1."),
    (r"(experts\.\d+)\.up_proj\.", r"\1.w3."),
    (r"(experts\.\d+)\.down_proj\.", r"\1.w2."),
)
# What transformers takes where a config leaves these out.
V3_DEFAULTS: Mapping[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "num_experts_per_tok": 8,
}
# By the names that configs give them.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "relu": "relu",
}


def model(fields: Fields, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    """The `ModelConfig` around `layers`; refuses what no part of the config reader has looked at."""
    fields.expect("is_causal", True)
    mtp_layers = [fields.whole(name, 0) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    config = ModelConfig(
        family=fields.family,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=fields.positive("hidden_size"),
        layers=layers,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_positions=_longest(fields, layers),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_token_ids=_eos_ids(fields),
        bos_token_id=fields.get("bos_token_id"),
        fp8_blocks=_fp8_blocks(fields),
        mtp_layers=max(mtp_layers),
    )
    fields.finish()
    return config


def gqa(
    fields: Fields,
    *,
    rope: bool = True,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
) -> GQAConfig:
    """Grouped-query attention from the usual fields."""
    hidden, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    kv_heads = fields.positive("num_key_value_heads", heads)
    head_dim = fields.positive("head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return GQAConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read_rope(fields, head_dim) if rope else None,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        window=window,
    )


def windows(fields: Fields) -> list[int | None]:
    """The attention window of each layer, from `layer_types` (v5) or `max_window_layers` (v4), as qwen2 and qwen3 mean
    them: none at all unless `use_sliding_window`."""
    count = fields.positive("num_hidden_layers")
    window = fields.positive_or_null("sliding_window")
    if not fields.flag("use_sliding_window"):
        window = None
    first = fields.whole("max_window_layers", 28)
    types = fields.names("layer_types") or [
        "sliding_attention" if window and index >= first else "full_attention" for index in range(count)
    ]
    known = {"sliding_attention": window, "full_attention": None}
    for kind in types:
        if kind not in known:
            raise ValueError(f"config.json: layer type {kind!r} is not supported for {fields.family}")
    if len(types) != count:
        raise ValueError(f"config.json: 'layer_types' has {len(types)} entries for {count} layers")
    return [known[kind] for kind in types]


def mlp(fields: Fields, *, bias: bool = False) -> MLPConfig:
    """The dense feed-forward."""
    return MLPConfig(fields.positive("intermediate_size"), activation(fields), bias)


def activation(fields: Fields) -> str:
    """The activation of feed-forwards, and of what follows a convolution."""
    fields.expect("hidden_act", *ACTIVATIONS)
    return ACTIVATIONS[fields.get("hidden_act", "silu")]


def mla(fields: Fields, *, interleaved: bool = True) -> MLAConfig:
    """Multi-head latent attention as every DeepSeek family spells it."""
    heads = fields.positive("num_attention_heads")
    if fields.get("num_key_value_heads", heads) != heads:
        raise ValueError(
            f"config.json: MLA needs num_key_value_heads = {heads}, not {fields.raw['num_key_value_heads']}"
        )
    nope, rope_dim = fields.positive("qk_nope_head_dim"), fields.positive("qk_rope_head_dim")
    fields.skip("qk_head_dim", "head_dim")  # both restate the two above
    rope = read_rope(fields, rope_dim, interleaved=interleaved)
    q_lora_rank = fields.need_or_null("q_lora_rank")  # null: no query latent
    return MLAConfig(
        heads=heads,
        q_lora_rank=None if q_lora_rank is None else fields.positive("q_lora_rank"),
        kv_lora_rank=fields.positive("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope_dim,
        value_dim=fields.positive("v_head_dim"),
        scale=(nope + rope_dim) ** -0.5 * mscale_scale(rope_settings(fields), rope.scaling.factor),
        rope=rope,
        bias=fields.flag("attention_bias"),
    )


def indexer(fields: Fields, attention: MLAConfig, *, interleaved: bool) -> IndexerConfig:
    """The lightning indexer of an MLA model; it turns the first rope dimensions with the rope of MLA."""
    if attention.q_lora_rank is None:
        raise ValueError(f"config.json: {fields.family} needs 'q_lora_rank': index queries are made from that latent")
    head_dim = fields.positive("index_head_dim", 128)
    if head_dim < attention.rope_dim:
        raise ValueError(f"config.json: index_head_dim {head_dim} is below qk_rope_head_dim {attention.rope_dim}")
    turned = fields.flag("indexer_rope_interleave", interleaved)
    return IndexerConfig(
        heads=fields.positive("index_n_heads"),
        head_dim=head_dim,
        topk=fields.positive("index_topk", 2048),
        query_dim=attention.q_lora_rank,
        rope=read_rope(fields, attention.rope_dim, interleaved=turned),
    )


def own_indexers(fields: Fields) -> list[bool]:
    """Which layers have an indexer of their own; the others reuse the selection of the last one that has
    (IndexShare, arXiv 2603.12201). v5: `indexer_types`; v4: `index_topk_pattern`, or `index_topk_freq` with
    `index_skip_topk_offset`."""
    count = fields.positive("num_hidden_layers")
    frequency = max(fields.whole("index_topk_freq", 1), 1)
    offset = fields.whole("index_skip_topk_offset", 2)
    pattern = fields.get("index_topk_pattern")  # "FSSF", or a list
    types = fields.names("indexer_types") or (
        list(pattern) if isinstance(pattern, str) else fields.names("index_topk_pattern")
    )
    if not types:
        return [max(layer - offset + 1, 0) % frequency == 0 for layer in range(count)]
    known = {"full": True, "F": True, "shared": False, "S": False}
    unknown = [kind for kind in types if kind not in known]
    if unknown or len(types) != count:
        raise ValueError(f"config.json: indexer types must be {count} of 'full' or 'shared', not {types}")
    if not known[types[0]]:
        raise ValueError("config.json: the first layer cannot share a selection: indexer_types[0] = 'shared'")
    return [known[kind] for kind in types]


def moe(fields: Fields, router: RouterConfig, *, bias: bool = False) -> MoEConfig:
    """DeepSeek's experts: routed ones and one always-on of `n_shared_experts` times their width."""
    hidden = fields.positive("moe_intermediate_size")
    experts = fields.positive("n_routed_experts")
    per_token = fields.positive("num_experts_per_tok")
    if per_token > experts // router.groups * router.groups_kept or experts % router.groups:
        raise ValueError(
            f"config.json: {per_token} experts a token cannot come from {router.groups_kept} of {router.groups} "
            f"groups of {experts} experts"
        )
    return MoEConfig(
        experts=experts,
        per_token=per_token,
        hidden=hidden,
        router=router,
        shared_hidden=hidden * fields.whole("n_shared_experts", 0),
        activation=activation(fields),
        bias=bias,
    )


def noaux_router(fields: Fields) -> RouterConfig:
    """DeepSeek-V3's router without auxiliary loss: sigmoid scores, a bias for choosing, groups by their top two."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    fields.expect("moe_router_dtype", "float32")
    groups = fields.positive("n_group", 1)
    return RouterConfig(
        scoring="sigmoid",
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5),
        correction_bias=True,
        groups=groups,
        groups_kept=min(fields.positive("topk_group", 1), groups),
        group_score="top2",
    )


def sparse_feed_forwards(fields: Fields, expert_config: MoEConfig) -> list[FeedForwardConfig]:
    """The feed-forward of each layer: v5 `mlp_layer_types`, v4 `first_k_dense_replace` and `moe_layer_freq`."""
    count = fields.positive("num_hidden_layers")
    first, frequency = fields.whole("first_k_dense_replace", 0), fields.positive("moe_layer_freq", 1)
    types = fields.names("mlp_layer_types") or [
        "sparse" if layer >= first and layer % frequency == 0 else "dense" for layer in range(count)
    ]
    if len(types) != count or set(types) - {"dense", "sparse"}:
        raise ValueError(f"config.json: 'mlp_layer_types' must be {count} of 'dense' or 'sparse', not {types}")
    # Only V2 has such biases. V3 and its descendants state them and have none; others would be among the weights.
    fields.skip("mlp_bias")
    dense = mlp(fields, bias=expert_config.bias)
    return [expert_config if kind == "sparse" else dense for kind in types]


def sparse_attention_model(fields: Fields, *, interleaved_index: bool) -> ModelConfig:
    """DeepSeek-V3.2 and its descendants: MLA with an indexer, or a shared selection, in every layer."""
    fields.expect("rope_interleave", True)
    if set(fields.names("layer_types")) - {"indexed_attention", "deepseek_sparse_attention"}:  # the latter: older files
        raise ValueError(f"config.json: 'layer_types' = {fields.raw['layer_types']} is not supported")
    attention = mla(fields)
    own = indexer(fields, attention, interleaved=interleaved_index)
    feed_forwards = sparse_feed_forwards(fields, moe(fields, noaux_router(fields)))
    layers = tuple(
        (BlockConfig(attention, own if is_own else None, shared_selection=not is_own), BlockConfig(feed_forward))
        for is_own, feed_forward in zip(own_indexers(fields), feed_forwards, strict=True)
    )
    return model(fields, layers)


def _eos_ids(fields: Fields) -> tuple[int, ...]:
    eos = fields.get("eos_token_id", [])
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"config.json: 'eos_token_id' must be a token id or a list of them, not {eos!r}")
    return tuple(ids)


def _longest(fields: Fields, layers: tuple[LayerConfig, ...]) -> int:
    """Positions that the model is meant for, from `max_position_embeddings` and what rope stretches.

    `linear` and `dynamic`: times the factor (configs keep the trained length there; vLLM reads them so too). `yarn`:
    the original length times the factor, where the config has not raised `max_position_embeddings` to it already.
    `llama3`: as it stands.
    """
    positions = fields.positive("max_position_embeddings")
    mixers = (block.operation for layer in layers for block in layer)
    ropes = [mixer.rope for mixer in mixers if isinstance(mixer, GQAConfig | MLAConfig) and mixer.rope]
    return max((_stretched(positions, rope.scaling) for rope in ropes), default=positions)


def _stretched(positions: int, scaling: RopeScaling) -> int:
    if scaling.kind in ("linear", "dynamic"):
        return int(positions * scaling.factor)
    if scaling.kind == "yarn":
        return max(positions, int(scaling.original_max_positions * scaling.factor))
    return positions


def _fp8_blocks(fields: Fields) -> Fp8Blocks | None:
    quantization = fields.mapping("quantization_config")
    if not quantization:
        return None
    method, blocks = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not blocks or quantization.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"config.json: 'quantization_config' = {method!r} is not supported (only fp8 e4m3 in blocks)")
    if not isinstance(blocks, list) or len(blocks) != 2 or not all(type(size) is int and size > 0 for size in blocks):
        raise ValueError(f"config.json: 'weight_block_size' must be two whole numbers above 0, not {blocks!r}")
    return Fp8Blocks(*blocks)
