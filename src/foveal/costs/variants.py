"""What a conversion would make of a model: its config with another attention."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from foveal.config.model import (
    BlockConfig,
    GQAConfig,
    IndexerConfig,
    MLAConfig,
    ModelConfig,
    OperationConfig,
    RopeConfig,
)

_KINDS = ("mha", "gqa:GROUPS", "mqa", "mla[:RANK]", "dsa[:TOPK]", "window:TOKENS")
_LATENT_RANK, _LATENT_ROPE = 512, 64  # DeepSeek-V2's and V3's
_TOPK, _INDEX_HEADS, _INDEX_DIM = 2048, 64, 128  # DeepSeek-V3.2's
_MOST_DIGITS = 10
_LEAST_ROPE = RopeConfig(_LATENT_ROPE, 10000.0)


@dataclass(frozen=True)
class _Step:
    kind: str
    number: int | None


def apply_variant(config: ModelConfig, variant: str) -> ModelConfig:
    """`config` with its attention exchanged; the rest stays.

    mha, gqa:8, mqa: per-head keys and values for all, 8 or 1 head(s). From MLA: as many heads, as wide as their
    keys without rope or their values, whichever is wider.
    mla, mla:256: a latent of 512 (or 256) and a rope key (`latent_rope_dim`), heads of the same width (TransMLA, arXiv
    2502.07864).
    dsa, dsa:1024: an indexer as in DeepSeek-V3.2 (64 heads of 128) with top-k 2048 (or 1024) in every attention layer.
    window:4096: per-head attention to the last 4096 tokens.
    Several may be joined: mla+dsa:2048. ValueError, naming it, for a variant that is unknown or does not fit the model.
    """
    for text in variant.split("+"):
        step = _parse(text)
        blocks = [block for block in config.blocks if isinstance(block.operation, GQAConfig | MLAConfig)]
        if not blocks:
            raise ValueError(f"variant {text!r} needs attention layers, which {config.family} does not have")
        config = _map_attention(config, _changes(step, config))
    return config


def latent_rope_dim(head_dim: int) -> int:
    """Width of the rope key that stands beside a latent made from heads of that width: 64 as in DeepSeek-V2, or all of
    a head that has no more."""
    return max(2, min(_LATENT_ROPE, head_dim // 2 * 2))


def _parse(text: str) -> _Step:
    kind, colon, number = text.partition(":")
    takes = {"mha": "", "mqa": "", "gqa": "required", "window": "required", "mla": "optional", "dsa": "optional"}
    digits = number.isascii() and number.isdecimal() and len(number) <= _MOST_DIGITS
    known = kind in takes and (not colon or (digits and int(number) > 0))
    if not known or (takes[kind] == "" and colon) or (takes[kind] == "required" and not colon):
        raise ValueError(f"variant {text!r} is not known (only {', '.join(_KINDS)}, joined by +)")
    return _Step(kind, int(number) if colon else None)


def _changes(step: _Step, config: ModelConfig) -> Callable[[BlockConfig], BlockConfig]:
    if step.kind == "dsa":
        return lambda block: _with_indexer(block, step.number or _TOPK, config.hidden_size)
    if step.kind == "mla":
        return lambda block: replace(block, operation=_to_mla(block.operation, step.number or _LATENT_RANK))
    if step.kind == "window":
        return lambda block: replace(block, operation=_windowed(block, step.number or 0))
    groups = {"mha": None, "mqa": 1, "gqa": step.number}[step.kind]
    return lambda block: _per_head(block, groups, config.hidden_size)


def _map_attention(config: ModelConfig, change: Callable[[BlockConfig], BlockConfig]) -> ModelConfig:
    layers = tuple(
        tuple(change(block) if isinstance(block.operation, GQAConfig | MLAConfig) else block for block in layer)
        for layer in config.layers
    )
    return replace(config, layers=layers)


def _per_head(block: BlockConfig, groups: int | None, hidden: int) -> BlockConfig:
    """Per-head keys and values; without a query latent, index queries are made from the hidden state."""
    indexer = replace(block.indexer, query_dim=hidden) if block.indexer else None
    return replace(block, operation=_to_gqa(block.operation, groups), indexer=indexer)


def _to_gqa(operation: OperationConfig, groups: int | None) -> GQAConfig:
    """`groups` heads of keys and values; None: one for each query head."""
    assert isinstance(operation, GQAConfig | MLAConfig)
    groups = operation.heads if groups is None else groups
    if groups > operation.heads or operation.heads % groups:
        raise ValueError(f"variant 'gqa:{groups}' does not fit: {operation.heads} heads are not a multiple of it")
    if isinstance(operation, GQAConfig):
        return replace(operation, kv_heads=groups)
    width = max(operation.nope_dim, operation.value_dim)
    rope = RopeConfig(width, operation.rope.theta) if operation.rope else None
    return GQAConfig(operation.heads, groups, width, width**-0.5, rope, o_bias=operation.bias)


def _to_mla(operation: OperationConfig, rank: int) -> MLAConfig:
    assert isinstance(operation, GQAConfig | MLAConfig)
    if isinstance(operation, MLAConfig):
        return replace(operation, kv_lora_rank=rank)
    if operation.window is not None:
        raise ValueError(f"variant 'mla' does not fit: a layer sees a window of {operation.window} tokens only")
    if operation.gated:
        raise ValueError("variant 'mla' does not fit: attention is gated, which latent attention is not")
    width, rope_dim = operation.head_dim, latent_rope_dim(operation.head_dim)
    rope = replace(_LEAST_ROPE, dim=rope_dim) if operation.rope else None
    return MLAConfig(
        heads=operation.heads,
        q_lora_rank=None,
        kv_lora_rank=rank,
        nope_dim=width,
        rope_dim=rope_dim,
        value_dim=width,
        scale=(width + rope_dim) ** -0.5,
        rope=rope,
    )


def _windowed(block: BlockConfig, tokens: int) -> GQAConfig:
    if not isinstance(block.operation, GQAConfig):
        raise ValueError(f"variant 'window:{tokens}' does not fit latent attention (gqa:8+window:{tokens} would)")
    if block.indexer or block.shared_selection:
        raise ValueError(f"variant 'window:{tokens}' does not fit: a layer selects tokens already")
    return replace(block.operation, window=tokens)


def _with_indexer(block: BlockConfig, topk: int, hidden: int) -> BlockConfig:
    """The block with an indexer of its own; one that it has, or shares, stays with another top-k."""
    if block.shared_selection:
        return block
    if block.indexer:
        return replace(block, indexer=replace(block.indexer, topk=topk))
    mixer = block.operation
    if isinstance(mixer, GQAConfig) and mixer.window is not None:
        raise ValueError(f"variant 'dsa:{topk}' does not fit: a layer sees a window of {mixer.window} tokens only")
    query_dim = (mixer.q_lora_rank if isinstance(mixer, MLAConfig) else None) or hidden
    return replace(block, indexer=IndexerConfig(_INDEX_HEADS, _INDEX_DIM, topk, query_dim, _LEAST_ROPE))
