"""`ModelConfig` and its parts: what a model is, in the words of this library.

Every family reads its own config.json into these (`foveal.config.families`); everything above (costs, layers, engine)
knows only these. Nothing here imports torch: `foveal plan` answers from a config alone.
"""

from dataclasses import dataclass, field
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (see `foveal.config.rope`)."""

    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: whole-number bounds of the ramp


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of `dim` dimensions (R or P in the legend)."""

    dim: int
    theta: float
    interleaved: bool = False
    """True: pairs (0,1), (2,3), ...; False: pairs (i, i + dim/2)."""
    scaling: RopeScaling = field(default_factory=RopeScaling)


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention; MHA when kv_heads == heads, MQA when kv_heads == 1."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    centred_norms: bool = False
    """The norms of queries and keys multiply by 1 + weight."""
    gated: bool = False
    """The query projection also makes a gate for each number of a head's output (Qwen3-Next)."""
    window: int | None = None
    """A query sees itself and the window - 1 tokens before it; None: every earlier token."""
    sinks: int = 0
    """The first tokens of the sequence, which every query sees besides, at the distance that they have in a cache of
    sinks + window tokens (StreamingLLM, arXiv 2309.17453, section 3.2)."""

    def __post_init__(self) -> None:
        """ValueError for sinks without a window, where they would be seen anyway, or fewer than none."""
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ValueError(f"sinks = {self.sinks} with window = {self.window}: sinks are what stands before a window")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: RopeConfig | None
    """None: the `rope_dim` dimensions are there, and not turned (Kimi Linear)."""
    bias: bool = False
    latent_norm_eps: float = 1e-6


@dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2 report, section 2.1)."""

    heads: int
    head_dim: int
    topk: int
    query_dim: int
    """Width of what index queries are projected from: the query latent, or the hidden state."""
    rope: RopeConfig
    """Turns the first rope.dim of the head_dim dimensions."""
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-1 selective state space (arXiv 2312.00752), with Jamba's norms on dt, B and C."""

    inner: int
    state: int
    conv: int
    dt_rank: int
    conv_bias: bool = True
    proj_bias: bool = False
    norms: bool = True
    activation: str = "silu"
    """Of what the convolution makes."""

    @property
    def inputs_shape(self) -> tuple[int, int]:
        """[W - 1, X]: what the convolution remembers of a sequence, in the model's dtype."""
        return self.conv - 1, self.inner

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[X, Y]: the state of a sequence, in float32."""
        return self.inner, self.state


@dataclass(frozen=True)
class S4DConfig:
    """S4D (arXiv 2206.11893): a diagonal linear recurrence in each of the hidden state's channels; `state` complex
    numbers, of which each stands for itself and its conjugate."""

    channels: int
    """The hidden size."""
    state: int

    @property
    def inputs_shape(self) -> tuple[int, int]:
        """[0, X]: there is no convolution that remembers inputs."""
        return 0, self.channels

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[X, Y, 2]: the state of a sequence, in float32."""
        return self.channels, self.state, 2


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 (arXiv 2405.21060, section 7): one decay a head; groups of heads share B and C, and are normed alone."""

    heads: int
    head_dim: int
    state: int
    groups: int
    conv: int
    conv_bias: bool = True
    proj_bias: bool = False
    activation: str = "silu"
    """Of what the convolution makes."""
    dt_limits: tuple[float, float] | None = None
    """The least and the most that a time step may be."""

    @property
    def inner(self) -> int:
        """Width of all heads."""
        return self.heads * self.head_dim

    @property
    def inputs_shape(self) -> tuple[int, int]:
        """[W - 1, X]: what the convolution over x, B and C remembers of a sequence, in the model's dtype."""
        return self.conv - 1, self.inner + 2 * self.groups * self.state

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[H, P, Y]: the state of a sequence, in float32."""
        return self.heads, self.head_dim, self.state


@dataclass(frozen=True)
class KDAConfig:
    """Kimi Delta Attention (Kimi Linear report, arXiv 2510.26692, section 3): a state of head_dim x head_dim a head,
    behind short convolutions on q, k and v, with gates through a bottleneck of head_dim."""

    heads: int
    head_dim: int
    conv: int
    activation: str = "silu"
    """Of what the convolution makes."""

    @property
    def inputs_shape(self) -> tuple[int, int]:
        """[W - 1, X]: what the convolutions over q, k and v remember of a sequence, in the model's dtype."""
        return self.conv - 1, 3 * self.heads * self.head_dim

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[H, P, P]: the state of a sequence, in float32."""
        return self.heads, self.head_dim, self.head_dim


@dataclass(frozen=True)
class GatedDeltaConfig:
    """The gated delta rule (arXiv 2412.06464) behind a short convolution on q, k and v, as in Qwen3-Next: each key head
    serves as many of the `heads` value heads as follow one another."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    conv: int
    activation: str = "silu"
    """Of what the convolution makes."""

    @property
    def inputs_shape(self) -> tuple[int, int]:
        """[W - 1, X]: what the convolution over q, k and v remembers of a sequence, in the model's dtype."""
        return self.conv - 1, 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[H, P, V]: the state of a sequence, in float32."""
        return self.heads, self.key_dim, self.value_dim


@dataclass(frozen=True)
class MLPConfig:
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    hidden: int
    activation: str = "silu"
    bias: bool = False


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts."""

    scoring: Literal["softmax", "sigmoid"]
    normalise: bool
    """Divide the chosen scores by their sum."""
    scale: float = 1.0
    correction_bias: bool = False
    """A bias that counts for choosing only (DeepSeek-V3, section 2.1.2)."""
    groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2"] = "max"
    masked_score: float = float("-inf")
    """Score of the experts outside the kept groups: -inf (V3 reference) or 0 (V2)."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts; `shared_hidden` is the width of the always-on expert (0: none)."""

    experts: int
    per_token: int
    hidden: int
    router: RouterConfig
    shared_hidden: int = 0
    shared_gate: bool = False
    """The shared expert's output is multiplied by a sigmoid of the token (Qwen2-MoE)."""
    activation: str = "silu"
    bias: bool = False
    """Biases in the shared expert (the routed ones never have any)."""

    def __post_init__(self) -> None:
        """ValueError for a token that would use more experts than there are."""
        if self.per_token > self.experts:
            raise ValueError(f"config.json: {self.per_token} experts a token cannot come from {self.experts} experts")


RecurrentConfig = S4DConfig | MambaConfig | Mamba2Config | GatedDeltaConfig | KDAConfig
"""Mixers that keep a state of constant size instead of something for each token."""
MixerConfig = GQAConfig | MLAConfig | RecurrentConfig
FeedForwardConfig = MLPConfig | MoEConfig
OperationConfig = MixerConfig | FeedForwardConfig


@dataclass(frozen=True)
class BlockConfig:
    """One residual block: x + operation(norm(x)), with an indexer beside the mixer where the selection is its own."""

    operation: OperationConfig
    indexer: IndexerConfig | None = None
    shared_selection: bool = False
    """Attend to the selection of the last block before this one that has an indexer."""

    def __post_init__(self) -> None:
        assert not (self.indexer and self.shared_selection)


LayerConfig = tuple[BlockConfig, ...]


@dataclass(frozen=True)
class Fp8Blocks:
    """Weights stored as e4m3 with one scale a block (`<name>_scale_inv`); `rows` x `columns` weights a block."""

    rows: int = 128
    columns: int = 128


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    max_positions: int
    centred_norms: bool = False
    """The norms before blocks and head multiply by 1 + weight."""
    tied_embeddings: bool = False
    dtype: str = "float32"
    """The dtype the checkpoint is meant to run in, by its torch name."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    fp8_blocks: Fp8Blocks | None = None
    mtp_layers: int = 0
    """Multi-token-prediction layers that the checkpoint may hold after the last layer; not loaded."""

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """All blocks, first to last."""
        return tuple(block for layer in self.layers for block in layer)

    @property
    def index_topk(self) -> int | None:
        """Tokens that a sparse layer attends to (None: no layer is sparse)."""
        return next((block.indexer.topk for block in self.blocks if block.indexer), None)
