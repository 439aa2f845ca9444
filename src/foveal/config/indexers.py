"""Indexers for a model that has none: which blocks get one, and of what shape."""

from dataclasses import replace

from foveal.config.model import BlockConfig, GQAConfig, IndexerConfig, MLAConfig, ModelConfig, RopeConfig

_THETA = 10_000.0  # where attention itself has no rope


def with_indexers(
    config: ModelConfig, *, heads: int, head_dim: int, topk: int, rope_dim: int | None = None
) -> ModelConfig:
    """The model with an indexer beside every attention block.

    Index queries are projected from the query latent, or from the hidden state where there is none. They are turned as
    attention's are, in half-split pairs: `rope_dim` of their dimensions (None: half of them, or one less where that is
    odd), and with latent attention as many as its own, which is what `deepseek_v32` means.
    Raises ValueError for a model that has indexers, or no attention, or attention windows, and for a rope_dim that the
    model cannot have.
    """
    if config.index_topk is not None:
        raise ValueError(f"{config.family} has indexers of its own")
    if not any(isinstance(block.operation, GQAConfig | MLAConfig) for block in config.blocks):
        raise ValueError(f"{config.family} has no attention, so there is nothing to index")

    def indexed(block: BlockConfig) -> BlockConfig:
        mixer = block.operation
        if isinstance(mixer, MLAConfig):
            rope = _latent_rope(mixer, rope_dim)
            query_dim = mixer.q_lora_rank or config.hidden_size
        elif isinstance(mixer, GQAConfig):
            if mixer.window is not None:
                raise ValueError(f"{config.family} attends to windows of {mixer.window} tokens, which need no index")
            rope = _rope(mixer.rope, head_dim // 4 * 2 if rope_dim is None else rope_dim)
            query_dim = config.hidden_size
        else:
            return block
        if rope.dim > head_dim:
            raise ValueError(f"head_dim = {head_dim}: index keys are narrower than their {rope.dim} rope dimensions")
        return replace(block, indexer=IndexerConfig(heads, head_dim, topk, query_dim, rope))

    return replace(config, layers=tuple(tuple(indexed(block) for block in layer) for layer in config.layers))


def _latent_rope(mixer: MLAConfig, rope_dim: int | None) -> RopeConfig:
    if rope_dim not in (None, mixer.rope_dim):
        raise ValueError(f"rope_dim = {rope_dim}: beside latent attention it is that one's, {mixer.rope_dim}")
    return _rope(mixer.rope, mixer.rope_dim)


def _rope(rope: RopeConfig | None, dim: int) -> RopeConfig:
    return replace(rope, dim=dim, interleaved=False) if rope else RopeConfig(dim, _THETA)
