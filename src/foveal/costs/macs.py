"""Multiply-accumulates (MACs) of a step: some new tokens at the end of a context.

Counted are the products with weights, queries with keys, weights with values, index queries with index keys, and the
updates of recurrent states. Not counted: norms, rotations, softmax, activations, the weighted sum over index heads, all
of which are small beside them. A floating-point operation count is twice the MACs.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from foveal.config.model import (
    BlockConfig,
    GatedDeltaConfig,
    GQAConfig,
    KDAConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    ModelConfig,
    S4DConfig,
)
from foveal.costs.attention import MLAForm, causal_pairs, cheapest_mla_form, mla_macs, selected_pairs
from foveal.costs.weights import Part, block_weights

Form = MLAForm | Literal["dense"]
"""dense: attention over per-head keys; the others are MLA's. sparse: only selected pairs, of either kind."""
MACS_PARTS: tuple[Part, ...] = ("feed_forward", "attention", "indexer", "recurrence", "lm_head")


def forms(config: ModelConfig) -> tuple[Form, ...]:
    """The forms in which the model's attention can be counted: MLA's two where it has MLA, `dense` where not; `sparse`
    where some layer selects, and `masked` where MLA does."""
    has_mla = any(isinstance(block.operation, MLAConfig) for block in config.blocks)
    dense: tuple[Form, ...] = ("expanded", "absorbed") if has_mla else ("dense",)
    if config.index_topk is None:
        return dense
    return (*dense, "masked", "sparse") if has_mla else (*dense, "sparse")


def step_macs(config: ModelConfig, queries: int, context: int, form: Form) -> dict[Part, int]:
    """MACs by part of `queries` new tokens, the last of `context` tokens; logits of the last one only.

    part = queries x (weights that a token is multiplied with) + `core_macs`.
    Dense forms (expanded, absorbed, dense) leave the indexer out: they are the model without sparse attention.
    """
    return _step_macs(_Folded.of(config), queries, context, form)


def decode_macs(config: ModelConfig, context: int, form: Form) -> dict[Part, int]:
    """MACs by part of the one new token at the end of `context` tokens."""
    return step_macs(config, 1, context, form)


def prefill_macs(config: ModelConfig, tokens: int, form: Form) -> dict[Part, int]:
    """MACs by part of a whole prompt, from nothing to its first new token."""
    return step_macs(config, tokens, tokens, form)


def core_macs(config: ModelConfig, queries: int, context: int, form: Form) -> dict[Part, int]:
    """What of `step_macs` is not a product with weights: attention's and the indexer's cores (MLA's absorption or
    expansion with them), and the updates of states."""
    return _core_macs(_Folded.of(config), queries, context, form)


def training_flops(config: ModelConfig, context: int, *, dense: bool) -> float:
    """Floating-point operations a token of learning from rows of `context` tokens, each one document: two a MAC, once
    forward and twice backward. The indexer's targets are not counted."""
    possible = forms(config)
    form: Form = "sparse" if "sparse" in possible and not dense else possible[0]
    macs = step_macs(config, context, context, form)
    return 6 * (sum(macs.values()) / context + macs["lm_head"] * (1 - 1 / context))


def running_form(config: ModelConfig, queries: int, context: int) -> Form:
    """The form that Foveal's layers run: the cheapest that gives the right numbers (`cheapest_mla_form`); selected
    pairs only once the context is longer than top-k."""
    topk = config.index_topk
    selects = topk is not None and context > topk
    latent = next((block.operation for block in config.blocks if isinstance(block.operation, MLAConfig)), None)
    if latent is not None:
        return cheapest_mla_form(latent, queries, context, topk)
    return "sparse" if selects else "dense"


def running_macs(config: ModelConfig, queries: int, context: int) -> dict[Part, int]:
    """MACs by part of what Foveal's layers run: `running_form`, and index keys in any case, which a context that is
    still short computes for later."""
    form = running_form(config, queries, context)
    macs = step_macs(config, queries, context, form)
    keys = sum(config.hidden_size * block.indexer.head_dim for block in config.blocks if block.indexer)
    if keys and "indexer" not in macs:
        macs["indexer"] = queries * keys
    return macs


def projection_macs(block: BlockConfig, hidden: int) -> dict[Part, int]:
    """MACs of one token through a block's weights: rows x columns x copies that it uses, summed by part. The latent's
    expansion (kv_b_proj) is left out: when and how often it happens is a matter of form."""
    macs: dict[Part, int] = {}
    for weight in block_weights(block, hidden):
        if weight.multiplies and weight.name != "kv_b_proj":
            macs[weight.part] = macs.get(weight.part, 0) + weight.numbers * weight.active
    return macs


def attention_core_macs(block: BlockConfig, queries: int, context: int, form: Form, topk: int | None) -> int:
    """MACs of queries with keys and of weights with values.

    Per-head keys: pairs x 2 H P, where a query sees sinks + window keys at most, and top-k at most when sparse. MLA:
    see `foveal.costs.attention.mla_macs`, expansion or absorption included.
    """
    mixer = block.operation
    if isinstance(mixer, MLAConfig):
        assert form != "dense"
        return mla_macs(mixer, queries, context, topk)[form]
    if not isinstance(mixer, GQAConfig):
        return 0
    limits = [limit for limit in (_reach(mixer), topk if form == "sparse" else None) if limit is not None]
    pairs = selected_pairs(queries, context, min(limits)) if limits else causal_pairs(queries, context)
    return pairs * 2 * mixer.heads * mixer.head_dim


def index_core_macs(block: BlockConfig, queries: int, context: int) -> int:
    """MACs of index queries with index keys: pairs x I J (DeepSeek-V3.2 report, equation 1)."""
    if block.indexer is None:
        return 0
    return causal_pairs(queries, context) * block.indexer.heads * block.indexer.head_dim


def state_macs(block: BlockConfig) -> int:
    """MACs of one token's update of a recurrent state, element by element.

    S4D: 8 X Y (a complex decay, the input, the real part of the output: arXiv 2206.11893, section 2). Mamba-1: 3 X Y
    (decay, input, output: arXiv 2312.00752, equation 2). Mamba-2: the same, X = H P. KDA: 4 H P^2 (decay, k^T S, the
    outer product, q^T S: arXiv 2510.26692, equation 1). Gated delta rule: 4 H P V likewise. So the recurrence computes
    it; chunked forms do more, in larger products.
    """
    mixer = block.operation
    if isinstance(mixer, S4DConfig):
        return 4 * math.prod(mixer.state_shape)
    if isinstance(mixer, MambaConfig | Mamba2Config):
        return 3 * math.prod(mixer.state_shape)
    if isinstance(mixer, GatedDeltaConfig | KDAConfig):
        return 4 * math.prod(mixer.state_shape)
    return 0


@dataclass(frozen=True)
class _Folded:
    """A model with equal blocks counted, which saves looking at each of a hundred layers again and again."""

    config: ModelConfig
    blocks: Counter[BlockConfig]

    @staticmethod
    def of(config: ModelConfig) -> "_Folded":
        return _Folded(config, Counter(config.blocks))


def _step_macs(model: _Folded, queries: int, context: int, form: Form) -> dict[Part, int]:
    assert 0 < queries <= context
    hidden = model.config.hidden_size
    macs: dict[Part, int] = dict.fromkeys(MACS_PARTS, 0) | _core_macs(model, queries, context, form)
    for block, copies in model.blocks.items():
        for part, count in projection_macs(block, hidden).items():
            if part != "indexer" or form in ("masked", "sparse"):
                macs[part] += copies * queries * count
    macs["lm_head"] = hidden * model.config.vocab_size
    return {part: count for part, count in macs.items() if count}


def _core_macs(model: _Folded, queries: int, context: int, form: Form) -> dict[Part, int]:
    topk, macs = model.config.index_topk, dict[Part, int]()
    for block, copies in model.blocks.items():
        parts: dict[Part, int] = {
            "attention": attention_core_macs(block, queries, context, _block_form(block, form), topk),
            "recurrence": queries * state_macs(block),
            "indexer": index_core_macs(block, queries, context) if form in ("masked", "sparse") else 0,
        }
        for part, count in parts.items():
            macs[part] = macs.get(part, 0) + copies * count
    return {part: count for part, count in macs.items() if count}


def _block_form(block: BlockConfig, form: Form) -> Form:
    """The form of a block that does not select in a model that does."""
    if block.indexer or block.shared_selection or form not in ("masked", "sparse"):
        return form
    if isinstance(block.operation, MLAConfig):
        return "expanded" if form == "masked" else "absorbed"
    return "dense"


@dataclass(frozen=True)
class DecodeFormula:
    """A decoded token's MACs as straight lines in the context length n: fixed parts, and parts a context token.

    Attention in the absorbed form for MLA. dense(n) = dense_fixed + attention_per_context_token n (+ windows);
    sparse(n) = sparse_fixed + indexer_per_context_token n + attention_per_context_token min(n, top-k).
    """

    feed_forward: int
    lm_head: int
    recurrence: int
    attention_fixed: int
    attention_per_context_token: int
    """Over all layers that see the whole context."""
    attention_per_window_token: dict[int, int]
    """By window (sinks included): over the layers with that window."""
    topk: int | None
    attention_selected: int
    """Attention to top-k tokens."""
    unselected_per_context_token: int
    """What of `attention_per_context_token` belongs to layers that never select."""
    indexer_fixed: int
    indexer_per_context_token: int

    @property
    def dense_fixed(self) -> int:
        """MACs of a token that sees nothing, without an indexer."""
        return self.feed_forward + self.lm_head + self.recurrence + self.attention_fixed

    @property
    def sparse_fixed(self) -> int:
        """The same with an indexer and attention to top-k tokens."""
        return self.dense_fixed + self.indexer_fixed + self.attention_selected

    @property
    def sparse_per_context_token(self) -> int:
        """What grows with the context in the sparse model."""
        return self.indexer_per_context_token + self.unselected_per_context_token

    def ratio_published(self, context: int) -> float:
        """Sparse over dense as it is usually stated: attention to k tokens even where there are fewer."""
        return (self.sparse_fixed + self.sparse_per_context_token * context) / self._dense(context)

    def ratio_actual(self, context: int) -> float:
        """Sparse over dense with attention to min(n, k) tokens: what a model that always scores would do."""
        assert self.topk is not None
        missing = max(0, self.topk - context) * (self.attention_selected // self.topk)
        return self.ratio_published(context) - missing / self._dense(context)

    @property
    def limit_ratio(self) -> float:
        """The ratio that long contexts tend to: index MACs over attention MACs a context token."""
        return self.sparse_per_context_token / self.attention_per_context_token

    @property
    def crossover_context(self) -> float | None:
        """The context length (tokens) where sparse and dense cost the same; None: sparse never pays."""
        saved = self.attention_per_context_token - self.sparse_per_context_token
        return (self.indexer_fixed + self.attention_selected) / saved if saved > 0 else None

    @property
    def pays_from(self) -> int | None:
        """The shortest context (tokens) at which sparse costs less; None: it never does."""
        return None if self.crossover_context is None else math.floor(self.crossover_context) + 1

    def _dense(self, context: int) -> int:
        return self.dense_fixed + self.attention_per_context_token * context


def decode_formula(config: ModelConfig) -> DecodeFormula:
    """The lines of a decoded token's cost."""
    first = step_macs(config, 1, 1, "absorbed" if "absorbed" in forms(config) else "dense")
    windows: dict[int, int] = {}
    whole = selecting = 0
    for block in config.blocks:
        per_token = _per_visible_token(block)
        window = _reach(block.operation) if isinstance(block.operation, GQAConfig) else None
        if window is not None:
            windows[window] = windows.get(window, 0) + per_token
            continue
        whole += per_token
        if block.indexer or block.shared_selection:
            selecting += per_token
    indexers = [block.indexer for block in config.blocks if block.indexer]
    return DecodeFormula(
        feed_forward=first.get("feed_forward", 0),
        lm_head=first["lm_head"],
        recurrence=first.get("recurrence", 0),
        attention_fixed=first.get("attention", 0) - whole - sum(windows.values()),
        attention_per_context_token=whole,
        attention_per_window_token=windows,
        topk=config.index_topk,
        attention_selected=(config.index_topk or 0) * selecting,
        unselected_per_context_token=whole - selecting,
        indexer_fixed=sum(projection_macs(block, config.hidden_size).get("indexer", 0) for block in config.blocks),
        indexer_per_context_token=sum(indexer.heads * indexer.head_dim for indexer in indexers),
    )


def _reach(mixer: GQAConfig) -> int | None:
    """Keys that a query sees at most."""
    return None if mixer.window is None else mixer.sinks + mixer.window


def _per_visible_token(block: BlockConfig) -> int:
    """MACs that one more visible token costs a query: H (2 C + R) for MLA, 2 H P for per-head keys."""
    mixer = block.operation
    if isinstance(mixer, MLAConfig):
        return mixer.heads * (2 * mixer.kv_lora_rank + mixer.rope_dim)
    return 2 * mixer.heads * mixer.head_dim if isinstance(mixer, GQAConfig) else 0


def prefill_crossover(config: ModelConfig, longest: int = 1 << 22) -> int | None:
    """The shortest prompt (tokens) whose prefill costs less sparse than in the cheapest dense form; None where there is
    none up to `longest`, or nothing selects."""
    model = _Folded.of(config)
    if config.index_topk is None or not _sparse_prefill_pays(model, longest):
        return None
    low, high = 1, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _sparse_prefill_pays(model, middle) else (middle, high)
    return high


def _sparse_prefill_pays(model: _Folded, tokens: int) -> bool:
    totals = {form: sum(_step_macs(model, tokens, tokens, form).values()) for form in forms(model.config)}
    dense = min(total for form, total in totals.items() if form not in ("masked", "sparse"))
    return totals["sparse"] < dense
