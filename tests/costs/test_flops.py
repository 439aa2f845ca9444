"""The arithmetic that is planned against the arithmetic that is done, counted by torch and by formulas of our own."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from counting import Counted, counted, counted_by_formula
from oracle import FAMILIES
from torch.nn.functional import grouped_mm, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from foveal.cache.layouts import StateSlots
from foveal.cache.store import CacheStore, plan_cache
from foveal.config import ModelConfig, read_config
from foveal.config.model import BlockConfig, GQAConfig, MLAConfig, MoEConfig, RecurrentConfig
from foveal.config.released import released
from foveal.costs import causal_pairs
from foveal.costs.macs import Form, projection_macs, running_macs, step_macs
from foveal.models.decoder import Decoder, Options
from foveal.nn.batch import Batch
from foveal.nn.moe import Router, Routing

LENGTH = 41  # far beyond the top-k of 12, beyond the windows of 20 and 24
SHORT = 9  # below top-k
Count = Callable[..., Any]


def config_of(name: str) -> ModelConfig:
    config = transformers.AutoConfig.for_model(name.split("-")[0], **FAMILIES[name])
    return read_config(config.to_dict())


def decoder_of(config: ModelConfig, form: str = "auto") -> Decoder:
    """A model with random weights, so that routers and indexers choose for themselves."""
    torch.manual_seed(0)
    model = Decoder(config, Options(mla_form=form)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def last_only(batch: Batch) -> Batch:
    """Logits of the last token, as in the engine."""
    return replace(batch, wanted_L=torch.tensor([len(batch.ids_T) - 1]))


def count_prefill(model: Decoder, tokens: int, counting: Count) -> Counted:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator)
    with torch.inference_mode(), counting() as found:
        model.step(last_only(Batch.packed(ids)))
    return found


def count_decode(model: Decoder, context: int, counting: Count) -> Counted:
    """One token after context - 1 others in the paged cache."""
    store = CacheStore(plan_cache(model.config, torch.float32), pages=4, slots=2)
    ids = torch.randint(3, model.config.vocab_size, (context,)).tolist()
    fresh, after = (StateSlots((1,), (1,), (start,)) for start in (True, False))
    with torch.inference_mode():
        model.step(Batch.paged([ids[:-1]], [0], [[1, 2]], slots=fresh), store)
        with counting() as found:
            model.step(last_only(Batch.paged([ids[-1:]], [context - 1], [[1, 2]], slots=after)), store)
    return found


def reference() -> Any:
    return counted("reference")


def in_torch() -> Any:
    return counted("torch")


def index_sums(config: ModelConfig, queries: int, context: int) -> int:
    """The weighted sums over index heads, which the plan leaves out: I a pair."""
    if config.index_topk is None or context <= config.index_topk:
        return 0
    heads = sum(block.indexer.heads for block in config.blocks if block.indexer)
    return heads * causal_pairs(queries, context)


def elementwise(config: ModelConfig, tokens: int) -> int:
    """What the reference's recurrences compute element by element, which torch does not count: the convolution, and all
    of a state's update but the product with C (the query), and with the key by the delta rule."""
    mixers = [block.operation for block in config.blocks]
    recurrent = [mixer for mixer in mixers if isinstance(mixer, RecurrentConfig)]
    return tokens * sum(_convolution(mixer) + 2 * math.prod(mixer.state_shape) for mixer in recurrent)


def _convolution(mixer: RecurrentConfig) -> int:
    """MACs of one token's convolution."""
    return mixer.inputs_shape[1] * mixer.conv


def lone_keys(config: ModelConfig, queries: int, context: int) -> int:
    """The weight of the only key that the first token sees, times its value: `einsum` makes no matrix product of it."""
    if queries < context:
        return 0
    total = 0
    for block in config.blocks:
        if isinstance(block.operation, GQAConfig):
            total += block.operation.heads * block.operation.head_dim
        elif isinstance(block.operation, MLAConfig):
            total += block.operation.heads * block.operation.kv_lora_rank
    return total


def forced_macs(config: ModelConfig, form: str, queries: int, context: int) -> int:
    """The plan for a model whose MLA is forced into a form."""
    topk = config.index_topk
    selects = topk is not None and context > topk
    sparse: dict[str, Form] = {"expanded": "masked", "absorbed": "sparse"}
    dense: dict[str, Form] = {"expanded": "expanded", "absorbed": "absorbed"}
    total = sum(step_macs(config, queries, context, (sparse if selects else dense)[form]).values())
    keys = sum(config.hidden_size * block.indexer.head_dim for block in config.blocks if block.indexer)
    return total + (0 if selects else queries * keys)


# One of each form; how rope is scaled changes nothing here.
NAMES = [
    name
    for name in FAMILIES
    if name not in ("llama-linear", "llama-dynamic", "llama-yarn", "deepseek_v3-halves") and "-yarn" not in name
]
LATENT = [name for name in NAMES if name.startswith(("deepseek", "glm"))]


@pytest.mark.parametrize("tokens", [SHORT, LENGTH])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_by_formula(name: str, tokens: int) -> None:
    """A part that the plan forgets or counts twice, in any family, below and beyond top-k."""
    model = decoder_of(config_of(name))
    found = count_prefill(model, tokens, counted_by_formula)
    assert found.total == sum(running_macs(model.config, tokens, tokens).values())


@pytest.mark.parametrize("context", [SHORT, LENGTH])
@pytest.mark.parametrize("name", NAMES)
def test_decode_by_formula(name: str, context: int) -> None:
    """The same for one token with a paged cache and recurrent states."""
    model = decoder_of(config_of(name))
    found = count_decode(model, context, counted_by_formula)
    assert found.total == sum(running_macs(model.config, 1, context).values())


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("context", [SHORT, LENGTH])
@pytest.mark.parametrize("name", LATENT)
def test_forms_of_latent_attention(name: str, context: int, form: str) -> None:
    """Expanded, absorbed, masked and sparse mixed up, in prefill or in decoding."""
    model = decoder_of(config_of(name), form)
    found = count_prefill(model, context, counted_by_formula)
    assert found.total == forced_macs(model.config, form, context, context)
    found = count_decode(model, context, counted_by_formula)
    assert found.total == forced_macs(model.config, form, 1, context)


@pytest.mark.parametrize("context", [SHORT, LENGTH])
@pytest.mark.parametrize("name", NAMES)
def test_against_torch_alone(name: str, context: int) -> None:
    """A formula of ours that is wrong in the plan and in the test alike: the references compute only what is visible,
    in torch's own operations, and torch counts them. What differs is named, to the last one."""
    config = config_of(name)
    has_mla = any(isinstance(block.operation, MLAConfig) for block in config.blocks)
    # The masked form's reference skips what the mask hides; `test_what_a_mask_costs` looks at that form.
    form = "absorbed" if has_mla else "auto"
    model = decoder_of(config, form)
    for queries, found in (
        (context, count_prefill(model, context, reference)),
        (1, count_decode(model, context, reference)),
    ):
        macs = forced_macs(config, form, queries, context) if has_mla else None
        planned = sum(running_macs(config, queries, context).values()) if macs is None else macs
        uncounted = elementwise(config, queries) + lone_keys(config, queries, context)
        assert found.total == planned + index_sums(config, queries, context) - uncounted


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "deepseek_v3"])
def test_what_a_mask_costs(name: str) -> None:
    """The expanded forms' own arithmetic: torch's version computes whole tiles, of which a causal mask throws away
    n (n - 1) / 2 pairs a head, and counts what the plan counts otherwise."""
    config = config_of(name)
    model = decoder_of(config, "expanded")
    found = count_prefill(model, LENGTH, in_torch)
    hidden = LENGTH * LENGTH - causal_pairs(LENGTH, LENGTH)
    wasted = 0
    for block in config.blocks:
        if isinstance(block.operation, MLAConfig):
            mla = block.operation
            wasted += hidden * mla.heads * (mla.nope_dim + mla.rope_dim + mla.value_dim)
        if block.indexer and config.index_topk is not None:
            wasted += hidden * block.indexer.heads * block.indexer.head_dim  # scores of the future, computed in a tile
            wasted += hidden * block.indexer.heads  # and their weighted sums
    planned = forced_macs(config, "expanded", LENGTH, LENGTH) + index_sums(config, LENGTH, LENGTH)
    assert found.total == planned + wasted


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_what_a_causal_mask_costs_dense(name: str) -> None:
    """A dense prefill in torch's version: one tile, so all of n x n where there is no window shorter than it."""
    config = config_of(name)
    found = count_prefill(decoder_of(config), LENGTH, in_torch)
    wasted = 0
    for block in config.blocks:
        if isinstance(block.operation, GQAConfig):
            gqa = block.operation
            pairs = sum(min(n, gqa.window or n) for n in range(1, LENGTH + 1))
            wasted += (LENGTH * LENGTH - pairs) * 2 * gqa.heads * gqa.head_dim
    assert found.total == sum(running_macs(config, LENGTH, LENGTH).values()) + wasted


def test_what_torch_takes_for_nothing() -> None:
    """The registered formulas: grouped_mm and the CPU's fused attention, which torch counts as zero."""
    x, weights = torch.randn(24, 16), torch.randn(3, 16, 32)
    offsets = torch.tensor([8, 8, 24], dtype=torch.int32)
    q, k, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16)

    def run() -> None:
        grouped_mm(x, weights, offs=offsets)
        scaled_dot_product_attention(q, k, v)

    with FlopCounterMode(display=False) as plain:
        run()
    assert plain.get_total_flops() == 0
    with counted("reference") as found:
        run()
    assert found.total == 24 * 16 * 32 + 2 * 5 * 7 * (16 + 16)


# Released sizes of families without a built-in name (Qwen2.5-7B, Qwen3-8B, Qwen3-Next-80B-A3B, Codestral Mamba).
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _QWEN
    | {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen3-8b": _QWEN
    | {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-next-80b": _QWEN
    | {
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "partial_rotary_factor": 0.25,
    },
    "codestral-mamba": {
        "model_type": "mamba2",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "state_size": 128,
    },
}
FULL_SIZE = {
    "deepseek-v3.2": 4,
    "deepseek-v3": 4,
    "deepseek-v2": 2,
    "glm-5": 4,
    "mixtral-8x7b": 1,
    "llama-3-70b": 1,
    "mistral-7b": 1,
    "jamba-1.5-large": 8,
    "kimi-linear-48b": 4,
    "mamba-2.8b": 1,
    "qwen2.5-7b": 1,
    "qwen3-8b": 1,
    "qwen3-next-80b": 4,
    "codestral-mamba": 1,
}
"""Layers until every kind has been seen."""


@pytest.mark.parametrize("tokens", [1024, 6000])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_modules(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that tiny models hide (a head of 192 that is 256 wide, experts of another width): every module of the real
    model on the meta device, with the routing and the selection given."""
    whole = read_config(OTHERS.get(name) or released(name))
    config = replace(whole, layers=whole.layers[: FULL_SIZE[name]])
    with torch.device("meta"):
        model = Decoder(config, Options(dtype=torch.bfloat16)).eval()
    monkeypatch.setattr(Router, "forward", _routed)
    batch = replace(Batch.packed(torch.zeros(1, tokens, dtype=torch.int64, device="meta")), wanted_L=torch.tensor([0]))
    monkeypatch.setattr("foveal.nn.step.rope_turns", _turns)
    with torch.inference_mode(), counted_by_formula(_shapes) as found:
        Whole(model)(batch)
    planned = running_macs(config, tokens, tokens)
    selects = config.index_topk is not None and tokens > config.index_topk
    assert found.total == sum(planned.values())
    if not config.tied_embeddings:  # a tied head is no module
        assert found.module("Whole.model.lm_head") == planned["lm_head"]
    for place, layer in enumerate(config.layers):
        for number, block in enumerate(layer):
            at = f"Whole.model.layers.{place}.blocks.{number}"
            macs = matrix_macs(block, config.hidden_size)
            if block.indexer:
                skipped = 0 if selects else block.indexer.heads * (block.indexer.query_dim * 128 + config.hidden_size)
                index_macs = projection_macs(block, config.hidden_size)["indexer"] - skipped
                assert found.module(f"{at}.indexer") == tokens * index_macs
                macs += index_macs
            assert found.module(at) == tokens * macs  # the query latent is made between operation and indexer


def matrix_macs(block: BlockConfig, hidden: int) -> int:
    """MACs of one token through a module's own matrices: without what our operations compute, experts and convolutions,
    with the latent's expansion or absorption, which are as large in a whole prefill."""
    operation = block.operation
    total = sum(count for part, count in projection_macs(block, hidden).items() if part != "indexer")
    if isinstance(operation, MoEConfig):
        total -= 3 * operation.per_token * hidden * operation.hidden
    elif isinstance(operation, RecurrentConfig):
        total -= _convolution(operation)
    elif isinstance(operation, MLAConfig):
        total += operation.kv_lora_rank * operation.heads * (operation.nope_dim + operation.value_dim)
    return total


class Whole(torch.nn.Module):
    """A model's step as a module's forward, from which torch's counter takes the names of what is inside."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Any:
        return self.model.step(batch)


def _routed(self: Router, x_TD: torch.Tensor) -> Routing:
    """Experts in turn; the router's product is made all the same."""
    logits_TE = torch.nn.functional.linear(x_TD, self.weight)
    experts, tokens = self.weight.shape[0], len(x_TD)
    chosen_TA = torch.arange(tokens * self.per_token).view(tokens, -1) % experts
    return Routing(logits_TE, x_TD.new_empty(tokens, self.per_token), chosen_TA)


def _turns(rope: Any, positions_T: torch.Tensor, prompts_T: Any, *, exact: bool) -> torch.Tensor:
    return torch.empty(len(positions_T), rope.dim // 2, dtype=torch.complex64, device="meta")


def _shapes(name: str, *args: Any, **kwargs: Any) -> Any:
    """What an operation returns, without numbers; a selection of the first tokens."""
    if name == "select":
        queries, topk = args[0].shape[0], kwargs["topk"]
        place_K = torch.arange(topk, dtype=torch.int32)
        return torch.where(place_K <= torch.arange(queries)[:, None], place_K, -1).int()
    if name in ("attention", "sparse_attention"):
        return args[0].new_empty(*args[0].shape[:2], args[2].context(0, 0, 1).shape[-1])
    if name in ("selective_scan", "ssd"):
        return args[0], args[5]
    if name == "delta_rule":
        return args[2], args[5]
    return (args[0], args[3]) if name == "causal_conv" else args[0]
