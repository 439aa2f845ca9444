"""Which weights a model has: their shapes, how many of them a token uses, how they are stored.

Everything that scales with weights (parameters, bytes, the arithmetic of projections) is counted from this one list.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from foveal.config.model import (
    BlockConfig,
    GatedDeltaConfig,
    GQAConfig,
    IndexerConfig,
    KDAConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    S4DConfig,
)

Part = Literal["embedding", "attention", "indexer", "recurrence", "feed_forward", "norms", "lm_head"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "indexer", "recurrence", "feed_forward", "norms", "lm_head")
Storage = Literal["matrix", "plain", "float32"]
"""matrix: what quantised checkpoints quantise; plain: stays in bfloat16 there; float32: always kept that wide."""


@dataclass(frozen=True)
class Weight:
    """Equal weights of `rows` x `columns` numbers (a vector has one row)."""

    part: Part
    name: str
    rows: int
    columns: int
    copies: int = 1
    """How many the block has: the experts."""
    active: int = 1
    """How many of them one token uses."""
    storage: Storage = "matrix"
    multiplies: bool = True
    """A token is multiplied with it: one multiply-accumulate a number. Not so norms, biases and embedding rows."""

    @property
    def numbers(self) -> int:
        """Numbers of one copy."""
        return self.rows * self.columns


def model_weights(config: ModelConfig) -> list[Weight]:
    """Every weight of the model, layer by layer; multi-token-prediction layers left out."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    weights = [Weight("embedding", "embed_tokens", vocabulary, hidden, storage="plain", multiplies=False)]
    for block in config.blocks:
        weights.append(_vector("norms", "norm", hidden))
        weights.extend(block_weights(block, hidden))
    weights.append(_vector("norms", "final_norm", hidden))
    # A tied head multiplies with the embedding, which is there already.
    copies = 0 if config.tied_embeddings else 1
    weights.append(Weight("lm_head", "lm_head", vocabulary, hidden, copies=copies, storage="plain"))
    return weights


def block_weights(block: BlockConfig, hidden: int) -> Iterator[Weight]:
    """The weights of one block and its indexer, its norm left out."""
    operation = block.operation
    if isinstance(operation, MLPConfig):
        yield from _mlp(operation.hidden, hidden, operation.bias)
    elif isinstance(operation, MoEConfig):
        yield from _moe(operation, hidden)
    else:
        yield from _mixer(operation, hidden)
    if block.indexer:
        yield from _indexer(block.indexer, hidden)


def _mixer(mixer: MixerConfig, hidden: int) -> Iterator[Weight]:
    if isinstance(mixer, GQAConfig):
        return _gqa(mixer, hidden)
    if isinstance(mixer, MLAConfig):
        return _mla(mixer, hidden)
    if isinstance(mixer, S4DConfig):
        return _s4d(mixer, hidden)
    if isinstance(mixer, MambaConfig):
        return _mamba(mixer, hidden)
    if isinstance(mixer, Mamba2Config):
        return _mamba2(mixer, hidden)
    if isinstance(mixer, GatedDeltaConfig):
        return _gated_delta(mixer, hidden)
    return _kda(mixer, hidden)


def _gqa(gqa: GQAConfig, hidden: int) -> Iterator[Weight]:
    """Queries D -> H P, keys and values D -> G P each, output H P -> D (arXiv 2305.13245). Gated: queries and gates
    D -> 2 H P."""
    query, key = gqa.heads * gqa.head_dim, gqa.kv_heads * gqa.head_dim
    for name, rows in (("q_proj", 2 * query if gqa.gated else query), ("k_proj", key), ("v_proj", key)):
        yield Weight("attention", name, rows, hidden)
        if gqa.qkv_bias:
            yield _vector("attention", f"{name}.bias", rows)
    yield Weight("attention", "o_proj", hidden, query)
    if gqa.o_bias:
        yield _vector("attention", "o_proj.bias", hidden)
    if gqa.qk_norm:
        yield _vector("attention", "q_norm", gqa.head_dim)
        yield _vector("attention", "k_norm", gqa.head_dim)


def _mla(mla: MLAConfig, hidden: int) -> Iterator[Weight]:
    """Queries D -> C_q -> H (P + R) or D -> H (P + R), latent D -> C + R, expansion C -> H (P + V), output H V -> D
    (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    query, latent = mla.heads * (mla.nope_dim + mla.rope_dim), mla.kv_lora_rank + mla.rope_dim
    if mla.q_lora_rank is None:
        yield Weight("attention", "q_proj", query, hidden)
    else:
        yield Weight("attention", "q_a_proj", mla.q_lora_rank, hidden)
        yield _vector("attention", "q_a_layernorm", mla.q_lora_rank)
        yield Weight("attention", "q_b_proj", query, mla.q_lora_rank)
    yield Weight("attention", "kv_a_proj_with_mqa", latent, hidden)
    yield _vector("attention", "kv_a_layernorm", mla.kv_lora_rank)
    yield Weight("attention", "kv_b_proj", mla.heads * (mla.nope_dim + mla.value_dim), mla.kv_lora_rank)
    yield Weight("attention", "o_proj", hidden, mla.heads * mla.value_dim)
    if mla.bias:
        if mla.q_lora_rank is not None:
            yield _vector("attention", "q_a_proj.bias", mla.q_lora_rank)
        yield _vector("attention", "kv_a_proj_with_mqa.bias", latent)
        yield _vector("attention", "o_proj.bias", hidden)


def _indexer(indexer: IndexerConfig, hidden: int) -> Iterator[Weight]:
    """Queries C_q -> I J, one key D -> J with a LayerNorm, head weights D -> I (DeepSeek-V3.2 report, section 2.1)."""
    yield Weight("indexer", "wq_b", indexer.heads * indexer.head_dim, indexer.query_dim)
    yield Weight("indexer", "wk", indexer.head_dim, hidden)
    yield Weight("indexer", "weights_proj", indexer.heads, hidden, storage="float32")
    for name in ("k_norm.weight", "k_norm.bias"):
        yield _vector("indexer", name, indexer.head_dim, storage="float32")


def _s4d(s4d: S4DConfig, hidden: int) -> Iterator[Weight]:
    """A and C, complex [X, Y], time steps and D [X], out X -> 2 D (arXiv 2206.11893, section 4)."""
    for name, numbers in (("A_log", 1), ("A_imag", 1), ("C", 2)):
        yield Weight("recurrence", name, s4d.channels, numbers * s4d.state, storage="float32", multiplies=False)
    for name in ("log_dt", "D"):
        yield _vector("recurrence", name, s4d.channels, storage="float32")
    yield Weight("recurrence", "out_proj", 2 * hidden, s4d.channels)
    yield _vector("recurrence", "out_proj.bias", 2 * hidden)


def _mamba(mamba: MambaConfig, hidden: int) -> Iterator[Weight]:
    """In D -> 2 X, convolution X W, dt, B and C from X -> rank + 2 Y, dt rank -> X, out X -> D, A [X, Y], D [X]
    (arXiv 2312.00752, section 3)."""
    inner, state, rank = mamba.inner, mamba.state, mamba.dt_rank
    yield Weight("recurrence", "in_proj", 2 * inner, hidden)
    yield Weight("recurrence", "conv1d", inner, mamba.conv, storage="plain")
    yield Weight("recurrence", "x_proj", rank + 2 * state, inner)
    yield Weight("recurrence", "dt_proj", inner, rank)
    yield _vector("recurrence", "dt_proj.bias", inner)
    yield Weight("recurrence", "A_log", inner, state, storage="float32", multiplies=False)
    yield _vector("recurrence", "D", inner, storage="float32")
    yield Weight("recurrence", "out_proj", hidden, inner)
    if mamba.conv_bias:
        yield _vector("recurrence", "conv1d.bias", inner)
    if mamba.proj_bias:
        yield _vector("recurrence", "in_proj.bias", 2 * inner)
        yield _vector("recurrence", "out_proj.bias", hidden)
    if mamba.norms:
        for name, size in (("dt_layernorm", rank), ("b_layernorm", state), ("c_layernorm", state)):
            yield _vector("recurrence", name, size)


def _mamba2(mamba: Mamba2Config, hidden: int) -> Iterator[Weight]:
    """In D -> 2 X + 2 G Y + H, convolution (X + 2 G Y) W, norm X, out X -> D; A, D and the bias of dt [H] (arXiv
    2405.21060, section 7)."""
    mixed = mamba.inputs_shape[1]
    yield Weight("recurrence", "in_proj", mamba.inner + mixed + mamba.heads, hidden)
    yield Weight("recurrence", "conv1d", mixed, mamba.conv, storage="plain")
    yield _vector("recurrence", "norm", mamba.inner)
    yield Weight("recurrence", "out_proj", hidden, mamba.inner)
    for name in ("A_log", "D", "dt_bias"):
        yield _vector("recurrence", name, mamba.heads, storage="float32")
    if mamba.conv_bias:
        yield _vector("recurrence", "conv1d.bias", mixed)
    if mamba.proj_bias:
        yield _vector("recurrence", "in_proj.bias", mamba.inner + mixed + mamba.heads)
        yield _vector("recurrence", "out_proj.bias", hidden)


def _gated_delta(delta: GatedDeltaConfig, hidden: int) -> Iterator[Weight]:
    """Queries, keys, values and output gates D -> 2 G P + 2 H V, learning rates and decays D -> 2 H, convolution
    (2 G P + H V) W, output H V -> D (arXiv 2412.06464, section 3.4)."""
    mixed, values = delta.inputs_shape[1], delta.heads * delta.value_dim
    yield Weight("recurrence", "in_proj_qkvz", mixed + values, hidden)
    yield Weight("recurrence", "in_proj_ba", 2 * delta.heads, hidden)
    yield Weight("recurrence", "conv1d", mixed, delta.conv, storage="plain")
    yield Weight("recurrence", "out_proj", hidden, values)
    yield _vector("recurrence", "norm", delta.value_dim)
    for name in ("A_log", "dt_bias"):
        yield _vector("recurrence", name, delta.heads, storage="float32")


def _kda(kda: KDAConfig, hidden: int) -> Iterator[Weight]:
    """Queries, keys and values D -> H P with a convolution each; decay and output gates D -> P -> H P; a learning rate
    a head D -> H; output H P -> D (Kimi Linear report, arXiv 2510.26692, section 4)."""
    inner = kda.heads * kda.head_dim
    for name in ("q", "k", "v"):
        yield Weight("recurrence", f"{name}_proj", inner, hidden)
        yield Weight("recurrence", f"{name}_conv1d", inner, kda.conv, storage="plain")
    for name in ("f", "g"):
        yield Weight("recurrence", f"{name}_a_proj", kda.head_dim, hidden)
        yield Weight("recurrence", f"{name}_b_proj", inner, kda.head_dim)
    yield Weight("recurrence", "b_proj", kda.heads, hidden)
    yield Weight("recurrence", "o_proj", hidden, inner)
    yield _vector("recurrence", "A_log", kda.heads, storage="float32")
    yield _vector("recurrence", "dt_bias", inner, storage="float32")
    yield _vector("recurrence", "o_norm", kda.head_dim)


def _mlp(width: int, hidden: int, bias: bool, name: str = "mlp") -> Iterator[Weight]:
    """Gate and up D -> F, down F -> D (SwiGLU, arXiv 2002.05202)."""
    for part, rows, columns in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
        yield Weight("feed_forward", f"{name}.{part}", rows, columns)
        if bias:
            yield _vector("feed_forward", f"{name}.{part}.bias", rows)


def _moe(moe: MoEConfig, hidden: int) -> Iterator[Weight]:
    """Router D -> E, E experts of which a token uses A, a shared one that all tokens use (arXiv 2412.19437, 2.1.2)."""
    yield Weight("feed_forward", "gate", moe.experts, hidden, storage="plain")
    if moe.router.correction_bias:
        yield _vector("feed_forward", "gate.e_score_correction_bias", moe.experts, storage="float32")
    for part, rows, columns in (
        ("gate_proj", moe.hidden, hidden),
        ("up_proj", moe.hidden, hidden),
        ("down_proj", hidden, moe.hidden),
    ):
        yield Weight("feed_forward", f"experts.{part}", rows, columns, copies=moe.experts, active=moe.per_token)
    if moe.shared_hidden:
        yield from _mlp(moe.shared_hidden, hidden, moe.bias, "shared_experts")
    if moe.shared_gate:
        yield Weight("feed_forward", "shared_expert_gate", 1, hidden, storage="plain")


def _vector(part: Part, name: str, size: int, storage: Storage = "plain") -> Weight:
    return Weight(part, name, 1, size, storage=storage, multiplies=False)
