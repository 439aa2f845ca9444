"""Blocks as one compiled call against the same blocks in float64, step by step over a cache."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from compiled import ISAS, each_isa
from torch import Tensor

from foveal.cache.store import CacheStore, plan_cache
from foveal.config import ModelConfig
from foveal.config.formats import PAGE_SIZE
from foveal.config.model import (
    BlockConfig,
    GatedDeltaConfig,
    GQAConfig,
    IndexerConfig,
    KDAConfig,
    LayerConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    MoEConfig,
    RecurrentConfig,
    RopeConfig,
    RouterConfig,
)
from foveal.kernels.cpu.block_run import block_run
from foveal.models.decoder import Decoder, Options
from foveal.nn import fused
from foveal.nn.batch import Batch, StateSlots
from foveal.nn.fused import FusedRun, PlainPart
from foveal.nn.step import FUSED_TOKENS

VOCAB, HIDDEN = 50, 40
PLAIN = GQAConfig(heads=6, kv_heads=2, head_dim=20, scale=0.2, rope=RopeConfig(dim=20, theta=1e4))
ATTENTION = {
    "plain": PLAIN,
    "norms and biases": replace(PLAIN, qk_norm=True, qkv_bias=True, o_bias=True),
    "window": replace(PLAIN, window=13),
    "one key head, a part of it turned": replace(PLAIN, kv_heads=1, rope=RopeConfig(8, 1e4, interleaved=True)),
    "no rope": replace(PLAIN, rope=None),
}
# New tokens of each sequence in each step; the first is a prefill, and one sequence joins later.
STEPS = [[70, 3, 64], [1, 1, 1], [1, 20, 3], [1, 1, 1, 5], [1], [1, 1, 1, 1]]
LATENT = MLAConfig(
    5, 24, 16, nope_dim=12, rope_dim=8, value_dim=10, scale=0.2, rope=RopeConfig(8, 1e4, interleaved=True)
)
INDEXER = IndexerConfig(heads=16, head_dim=32, topk=12, query_dim=24, rope=RopeConfig(8, 1e4))
# Groups, a correction bias, a shared expert; and softmax, groups masked with 0, a shared expert with a gate and biases.
SIGMOID = RouterConfig(
    "sigmoid", normalise=True, scale=2.5, correction_bias=True, groups=4, groups_kept=2, group_score="top2"
)
SOFTMAX = RouterConfig("softmax", normalise=False, groups=2, groups_kept=1, masked_score=0.0)
MIXTURES = (
    MoEConfig(16, 3, 20, SIGMOID, shared_hidden=28),
    MoEConfig(6, 2, 20, SOFTMAX, shared_hidden=24, shared_gate=True, bias=True),
)
SPARSE: dict[str, tuple[MLAConfig | GQAConfig, IndexerConfig | None]] = {
    "sparse": (LATENT, INDEXER),
    "without a query latent, biases": (
        replace(LATENT, q_lora_rank=None, bias=True),
        replace(INDEXER, query_dim=HIDDEN, rope=RopeConfig(8, 1e4, interleaved=True)),
    ),
    "no rope, rank of many registers": (replace(LATENT, rope=None, kv_lora_rank=150, nope_dim=33), INDEXER),
    "dense": (LATENT, None),
    "grouped queries": (replace(PLAIN, qk_norm=True), replace(INDEXER, query_dim=HIDDEN)),
}
needs_kernels = pytest.mark.skipif(not ISAS, reason="no compiled kernels")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def make_config(attention: GQAConfig, other: GQAConfig, *, tied: bool, activation: str = "silu") -> ModelConfig:
    feed_forward = MLPConfig(56, activation, bias=attention.o_bias)
    layers = tuple((BlockConfig(mixer), BlockConfig(feed_forward)) for mixer in (attention, other))
    return ModelConfig("test", VOCAB, HIDDEN, layers, norm_eps=1e-5, max_positions=512, tied_embeddings=tied)


def make_decoders(config: ModelConfig, dtype: torch.dtype, index: str = "auto") -> tuple[Decoder, Decoder]:
    """A random model in `dtype`, and the same weights in float64."""
    decoder, exact = Decoder(config, Options(dtype, index)), Decoder(config, Options(torch.float64))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    exact.load_state_dict(decoder.state_dict())
    return decoder, exact


def make_cache(config: ModelConfig, dtype: torch.dtype, kv: str = "auto", index: str = "auto") -> CacheStore:
    """A cache whose rows are NaN until they are written."""
    store = CacheStore(plan_cache(config, dtype, kv, index), pages=20, slots=12)
    for layer in store.layers:
        for block in layer:
            for layout in block.paged if block else ():
                layout.pages.fill_(0xFF if layout.pages.dtype == torch.uint8 else torch.nan)
            for state in block.state.states if block and block.state else ():
                state.fill_(torch.nan)
    return store


def make_batches() -> Iterator[Batch]:
    """The batches of STEPS, with random tokens, on shuffled pages; states move to another slot now and then."""
    pages = (torch.randperm(19) + 1).tolist()
    lengths: dict[int, int] = {}
    tables: dict[int, list[int]] = {}
    slots: dict[int, int] = {}
    for counts in STEPS:
        tokens = [torch.randint(0, VOCAB, (count,)).tolist() for count in counts]
        starts = [lengths.get(s, 0) for s in range(len(counts))]
        for s, count in enumerate(counts):
            lengths[s] = starts[s] + count
            table = tables.setdefault(s, [])
            while len(table) * PAGE_SIZE < lengths[s]:
                table.append(pages.pop())
        known = range(len(counts))
        before = [slots.get(s, 0) for s in known]
        slots |= {s: 1 + s if before[s] % 2 else 6 + s for s in known if not before[s] or counts[s] > 1}
        states = StateSlots(tuple(before), tuple(slots[s] for s in known), tuple(slot == 0 for slot in before))
        yield Batch.paged(tokens, starts, [tables[s] for s in known], slots=states)


@torch.inference_mode()
def beside_exact(decoder: Decoder, exact: Decoder) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of each batch, in float64, and what the model in float64 makes of it."""
    caches = [make_cache(model.config, model.options.dtype) for model in (decoder, exact)]
    for batch in make_batches():
        yield decoder.step(batch, caches[0]).logits_LV.double(), exact.step(batch, caches[1]).logits_LV.double()


@torch.inference_mode()
def beside_plain(
    decoder: Decoder, caches: tuple[CacheStore, CacheStore], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of each batch, and those of the same blocks one by one."""
    for batch in make_batches():
        result = decoder.step(batch, caches[0]).logits_LV
        with monkeypatch.context() as plain:
            plain.setattr(decoder, "_parts", [])
            expected = decoder.step(batch, caches[1]).logits_LV
        yield result, expected


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTION)
def test_steps(isa: str, dtype: torch.dtype, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys written to the wrong row or read from one, a norm, bias, rope or window left out, another order."""
    monkeypatch.setattr(fused, "block_run", partial(block_run, isa=isa))
    config = make_config(ATTENTION[attention], PLAIN, tied=attention == "window")
    decoder, exact = make_decoders(config, dtype)
    decoder.pack()
    assert [type(part) for part in decoder._parts] == [FusedRun]
    ran = []
    monkeypatch.setattr(FusedRun, "__call__", lambda *args, call=FusedRun.__call__: ran.append(1) or call(*args))
    for result, expected in beside_exact(decoder, exact):
        assert (result - expected).norm() / expected.norm() < TOLERANCE[dtype]
    assert len(ran) == sum(sum(counts) <= FUSED_TOKENS for counts in STEPS) > 0


def make_sparse(kind: str) -> ModelConfig:
    """Latent attention, the second layer with the first one's selection, and mixtures of experts."""
    mixer, indexer = SPARSE[kind]
    layers: list[LayerConfig] = [
        (BlockConfig(mixer, indexer), BlockConfig(MLPConfig(56))),
        (BlockConfig(mixer, shared_selection=indexer is not None), BlockConfig(MIXTURES[0])),
        (BlockConfig(mixer, indexer), BlockConfig(MIXTURES[1])),
    ]
    return ModelConfig("test", VOCAB, HIDDEN, tuple(layers), norm_eps=1e-5, max_positions=512)


@each_isa
@pytest.mark.parametrize("kind", SPARSE)
def test_latent_steps(isa: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent, index key or expert of another; a selection that is not handed on; a group, bias, scale or gate left
    out."""
    monkeypatch.setattr(fused, "block_run", partial(block_run, isa=isa))
    config = make_sparse(kind)
    decoder, exact = make_decoders(config, torch.float32)
    decoder.pack()
    assert [type(part) for part in decoder._parts] == [FusedRun]
    for result, expected in beside_exact(decoder, exact):
        assert (result - expected).norm() / expected.norm() < 5e-6


@each_isa
@pytest.mark.parametrize("kv", ["auto", "fp8", "bf16"])
@pytest.mark.parametrize("index", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_caches(isa: str, dtype: torch.dtype, kv: str, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every form that caches take, written or read as another; one that the kernels do not read (bfloat16
    latents of a float32 model) taken for one of theirs.

    A last bit may round another way and select another token now and then; most rows agree.
    """
    monkeypatch.setattr(fused, "block_run", partial(block_run, isa=isa))
    config = make_sparse("sparse")
    decoder, _ = make_decoders(config, dtype, index)
    decoder.quantise("int8")
    decoder.pack()
    assert [type(part) for part in decoder._parts] == [FusedRun]
    caches = make_cache(config, dtype, kv, index), make_cache(config, dtype, kv, index)
    errors = [
        (result - expected).norm(dim=1) / expected.norm(dim=1)
        for result, expected in beside_plain(decoder, caches, monkeypatch)
        if len(result) <= FUSED_TOKENS
    ]
    assert torch.cat(errors).median() < (1e-3 if dtype == torch.float32 else 4e-2)


RECURRENT: dict[str, RecurrentConfig] = {
    "gated delta": GatedDeltaConfig(heads=6, key_heads=2, key_dim=12, value_dim=20, conv=4),
    "kda": KDAConfig(heads=3, head_dim=20, conv=4),
    "mamba": MambaConfig(inner=56, state=16, conv=4, dt_rank=5, norms=False),
    "jamba": MambaConfig(inner=56, state=10, conv=4, dt_rank=5, conv_bias=False, proj_bias=True),
    "mamba 2": Mamba2Config(heads=6, head_dim=12, state=16, groups=2, conv=4),
    "mamba 2, limits, biases": Mamba2Config(3, 20, 8, 1, 3, conv_bias=False, proj_bias=True, dt_limits=(0.2, 0.9)),
}


def make_hybrid(mixer: RecurrentConfig) -> ModelConfig:
    """Two recurrent layers beside one of attention."""
    mixers = (mixer, PLAIN, mixer)
    layers = tuple((BlockConfig(each), BlockConfig(MLPConfig(56))) for each in mixers)
    return ModelConfig("test", VOCAB, HIDDEN, layers, norm_eps=1e-5, max_positions=512)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", RECURRENT)
def test_recurrent_steps(isa: str, dtype: torch.dtype, mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of another slot, one that is not zero at the start or not written back; a gate, norm, limit or bias left
    out."""
    monkeypatch.setattr(fused, "block_run", partial(block_run, isa=isa))
    config = make_hybrid(RECURRENT[mixer])
    decoder, exact = make_decoders(config, dtype)
    decoder.pack()
    assert [type(part) for part in decoder._parts] == [FusedRun]
    for result, expected in beside_exact(decoder, exact):
        assert (result - expected).norm() / expected.norm() < 3 * TOLERANCE[dtype]  # as large as the plain form's


@needs_kernels
def test_who_looks_inside_sees_the_plain_form() -> None:
    """Selections and experts that are asked for and not there."""
    config = make_sparse("sparse")
    decoder, _ = make_decoders(config, torch.float32)
    decoder.pack()
    cache = make_cache(config, torch.float32)
    with torch.inference_mode():
        for batch in make_batches():
            collected = decoder.step(replace(batch, collect=frozenset({"selection", "experts"})), cache).collected
            assert len(collected["selection"]) == 3 and len(collected["experts"]) == 2


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers(dtype: torch.dtype, quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused form rounding at other places than the plain one, so that tokens depend on the batch they are in."""
    config = make_config(ATTENTION["norms and biases"], ATTENTION["window"], tied=False)
    decoder, _ = make_decoders(config, dtype)
    if quantization:
        decoder.quantise(quantization)
    decoder.pack()
    assert decoder._parts
    caches = make_cache(config, dtype), make_cache(config, dtype)
    for result, expected in beside_plain(decoder, caches, monkeypatch):
        assert torch.equal(result, expected)


@needs_kernels
def test_blocks_that_cannot_stay_plain() -> None:
    """A block without a fused form that is skipped, or run with another's cache."""
    config = make_config(PLAIN, PLAIN, tied=True, activation="gelu")
    decoder, exact = make_decoders(config, torch.float32)
    decoder.pack()
    assert [type(part) for part in decoder._parts] == [FusedRun, PlainPart] * 2
    for result, expected in beside_exact(decoder, exact):
        assert (result - expected).norm() / expected.norm() < TOLERANCE[torch.float32]


def test_gradients_and_unpacked_models_take_the_plain_way() -> None:
    """The fused form, which has no gradients, where they are asked for."""
    config = make_config(PLAIN, PLAIN, tied=True)
    decoder, _ = make_decoders(config, torch.float32)
    assert decoder._parts == []
    decoder.pack()
    cache = make_cache(config, torch.float32)
    (first, *_) = make_batches()
    batch = replace(first, wanted_L=torch.tensor([0]))
    assert decoder.step(batch, cache).logits_LV.requires_grad
