"""Forms of attention and selections inside mixed batches, with every kind of cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import VOCAB, make_oracle
from torch import Tensor

from foveal import load_model
from foveal.cache.store import CacheStore, plan_cache
from foveal.models import Decoder
from foveal.nn import mla
from foveal.nn.batch import Batch
from foveal.nn.mla import FORMS, MLA

LENGTHS = [90, 5, 40, 14]  # with index_topk 12: sparse, dense, sparse, and on the edge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dsa")
    make_oracle("glm_moe_dsa", path)
    return path


def force(model: Decoder, form: str) -> None:
    for module in model.modules():
        if isinstance(module, MLA):
            module.form = form


def by_steps(model: Decoder, sequences: list[Tensor], chunks: list[int], **cache: str) -> list[Tensor]:
    """Logits of all positions, computed in packed steps of so many tokens of each sequence at a time."""
    plan = plan_cache(model.config, model.options.dtype, index_dtype=model.options.index_dtype, **cache)
    store = CacheStore(plan, pages=1 + 2 * len(sequences), slots=0)
    tables = [[2 * s + 2, 2 * s + 1] for s in range(len(sequences))]
    done, logits = [0] * len(sequences), [[] for _ in sequences]
    for chunk in [*chunks, *[1] * 100]:
        active = [s for s, ids in enumerate(sequences) if done[s] < len(ids)]
        if not active:
            break
        tokens = [sequences[s][done[s] : done[s] + chunk].tolist() for s in active]
        batch = Batch.paged(tokens, [done[s] for s in active], [tables[s] for s in active])
        rows = model.step(batch, store).logits_LV.split([len(part) for part in tokens])
        for s, part, row in zip(active, tokens, rows, strict=True):
            logits[s].append(row)
            done[s] += len(part)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("index_dtype", ["float32", "fp8", "int8", "bf16"])
@torch.no_grad()
def test_steps_equal_the_whole(folder: Path, form: str, index_dtype: str) -> None:
    """Sequences of one batch in different forms, or with and without a selection, getting into each other.

    Rounded keys tip over now and then, and another token is selected: then only most positions agree.
    """
    model = load_model(folder, dtype="float32", index_dtype=index_dtype)
    force(model, form)
    sequences = [torch.randint(3, VOCAB, (length,)) for length in LENGTHS]
    stepped = by_steps(model, sequences, [33, 20, 7])
    for ids, logits in zip(sequences, stepped, strict=True):
        whole = model(ids[None])[0]
        wrong = ((logits - whole).abs().amax(-1) > 2e-4 * whole.abs().max()).float().mean()
        assert wrong == 0 if index_dtype == "float32" else wrong < 0.5


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("stored", "most"), [("fp8", 0.3), ("bf16", 0.03)])
def test_rounded_latents(stored: str, most: float, form: str, tmp_path: Path) -> None:
    """Latents of fewer bits changing more than rounding would: logits stay close, and do change."""
    # Without experts and selections, which a rounding error could tip over.
    make_oracle("deepseek_v3", tmp_path, first_k_dense_replace=3)
    model = load_model(tmp_path, dtype="float32")
    ids = torch.randint(3, VOCAB, (50,))
    exact = by_steps(model, [ids], [30])[0]
    force(model, form)
    rounded = by_steps(model, [ids], [30], kv_cache_dtype=stored)[0]
    error = (exact - rounded).norm() / exact.norm()
    assert 1e-5 < error < most


@torch.no_grad()
def test_collected_selection(folder: Path) -> None:
    """The selection that a caller asks for: positions ascending, -1 last, in the past, shared layers repeating it."""
    model = load_model(folder, dtype="float32")
    sequences = [torch.randint(3, VOCAB, (length,)) for length in LENGTHS]
    batch = Batch.packed(sequences)
    collect: dict[str, Any] = model.step(replace(batch, collect=frozenset({"selection", "experts"}))).collected
    selections = collect["selection"]
    assert len(selections) == len(model.config.layers)
    for selection in selections:
        assert selection.dtype == torch.int32 and selection.shape == (sum(LENGTHS), 12)
        for row, position in zip(selection, batch.positions_T, strict=True):
            chosen = row[row >= 0]
            assert len(chosen) == min(12, position + 1)
            assert (chosen.diff() > 0).all() and chosen.max() <= position
            assert (row[len(chosen) :] == -1).all()
    own = [layer[0].indexer is not None for layer in model.config.layers]
    for layer in range(1, len(own)):
        assert torch.equal(selections[layer], selections[layer - 1]) != own[layer]
    assert [tuple(chosen.shape) for chosen in collect["experts"]] == [(sum(LENGTHS), 3)] * 4


def test_gradients_reach_every_weight(folder: Path) -> None:
    """A weight that training could not move. The indexer has none: selecting is not differentiable."""
    model = load_model(folder, dtype="float32")
    model(torch.randint(3, VOCAB, (2, 30))).square().sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without and all("indexer" in name for name in without)


@torch.no_grad()
def test_heads_in_groups(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads expanded one at a time getting each other's weights or queries."""
    model = load_model(folder, dtype="float32", mla_form="expanded")
    ids = torch.randint(3, VOCAB, (2, 40))
    together = model(ids)
    monkeypatch.setattr(mla, "EXPANDED_NUMBERS", 1)
    assert torch.allclose(model(ids), together, atol=1e-4)
