"""Quality of selections, against attention weights that transformers returns."""

from pathlib import Path

import pytest
import torch
from oracle import make_oracle

from foveal import load_model
from foveal.evaluate.recall import kept_share, over_layers, overlap, selection_quality
from foveal.evaluate.selecting import Selection, selecting
from foveal.evaluate.text import Window
from foveal.kernels import divergence
from foveal.models.decoder import Block
from foveal.nn.batch import Batch
from foveal.nn.selectors import random, recent

TOPK = 12


def test_overlap_counts_what_both_have() -> None:
    """Guards against missing entries that are taken for equal ones."""
    mine = torch.tensor(
        [[1, 3, 5, 9], [0, 1, -1, -1], [0, 2, 4, 6], [-1, -1, -1, -1], [7, 8, 9, 10]], dtype=torch.int32
    )
    theirs = torch.tensor(
        [[1, 2, 5, 7], [0, 1, 2, -1], [0, 2, 4, 6], [-1, -1, -1, -1], [1, 2, 3, 4]], dtype=torch.int32
    )
    torch.testing.assert_close(overlap(mine, theirs), torch.tensor([2 / 6, 2 / 3, 1, 1, 0]))


def test_kept_share_leaves_out_what_is_missing() -> None:
    shares = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    kept = kept_share(shares, torch.tensor([[0, 2], [1, -1]], dtype=torch.int32))
    torch.testing.assert_close(kept, torch.tensor([0.8, 0.5]))


@torch.no_grad()
def test_quality_is_that_of_the_whole_matrices(
    tmp_path: Path, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every measure, computed again from [T, T] matrices: transformers' attention weights (averaged over heads) and
    index scores by their formula. Guards against queries that are counted though they see no more than top-k, and
    against tiles and chunks whose rows slip."""
    monkeypatch.setattr(divergence, "TILE_SCORES", 16 * 150 * 7)  # tiles of seven queries
    oracle = make_oracle("deepseek_v32", tmp_path, attn_implementation="eager")
    oracle.config.index_topk = 256
    for layer in oracle.model.layers:
        layer.self_attn.indexer.index_topk = 256
    model = load_model(tmp_path)
    qualities = selection_quality(model, windows[:1], dense=True)
    ids = torch.tensor([windows[0].ids])
    weights = [one[0].mean(0) for one in oracle(ids, output_attentions=True).attentions]
    scores = index_score_matrices(model, ids)
    positions = torch.arange(ids.shape[1])[TOPK:]
    chosen = [matrix.topk(TOPK).indices.sort().values[TOPK:].int() for matrix in scores]
    for layer, quality in enumerate(qualities):
        shares = weights[layer][TOPK:]
        log_scores = scores[layer].log_softmax(-1)[TOPK:]
        expected = {
            "recall": kept_share(shares, chosen[layer]),
            "recency": kept_share(shares, recent(positions, TOPK)),
            "oracle": shares.topk(TOPK).values.sum(-1),
            "random": kept_share(shares, random(positions, TOPK, seed=layer + 1)),
            "divergence": (torch.special.xlogy(shares, shares) - (shares * log_scores).nan_to_num(0.0)).sum(-1),
            "query_overlap": overlap(chosen[layer][1:], chosen[layer][:-1]),
        }
        if layer:
            expected["layer_overlap"] = overlap(chosen[layer], chosen[layer - 1])
        else:
            assert quality.layer_overlap is None
        for name, values in expected.items():
            estimate = getattr(quality, name)
            assert estimate.count == len(values), name
            assert estimate.mean == pytest.approx(float(values.mean()), abs=2e-4), name


def index_score_matrices(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """[T, T] by layer, -inf for the future; of dense attention's hidden states."""
    matrices = []

    def watch(sight: object) -> None:
        glance = sight.glance  # type: ignore[attr-defined]
        k_NJ = glance.keys.context(0, 0, ids.shape[1])
        scores = torch.einsum("ti,tin->tn", glance.weights_TI, torch.relu(glance.q_TIJ @ k_NJ.T))
        matrices.append(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")))

    model.step(Batch.packed(ids, dense=True), watch=watch)
    return matrices


def test_means_leave_out_what_is_not_there(tmp_path: Path, windows: list[Window]) -> None:
    make_oracle("deepseek_v32", tmp_path)
    first, second, third = qualities = selection_quality(load_model(tmp_path), windows)
    means = over_layers(qualities)
    assert means["recall"] == pytest.approx((first.recall.mean + second.recall.mean + third.recall.mean) / 3)
    assert second.layer_overlap and third.layer_overlap
    assert means["layer_overlap"] == pytest.approx((second.layer_overlap.mean + third.layer_overlap.mean) / 2)
    assert "layer_overlap" not in over_layers([first])


def test_the_model_runs_as_it_does(tmp_path: Path, windows: list[Window]) -> None:
    """The first layer's input is the same either way; later ones differ, and chunks do not matter."""
    make_oracle("deepseek_v32", tmp_path)
    model = load_model(tmp_path)
    sparse, dense = selection_quality(model, windows), selection_quality(model, windows, dense=True)
    assert sparse[0].recall.mean == pytest.approx(dense[0].recall.mean, abs=1e-6)
    assert sparse[2].recall.mean != pytest.approx(dense[2].recall.mean, abs=1e-6)
    assert sparse[0].recall.count == sum(len(window.ids) - TOPK for window in windows)


@pytest.mark.parametrize("index_dtype", ["fp8", "int8", "bf16"])
def test_rounded_index_keys(index_dtype: str, tmp_path: Path, windows: list[Window]) -> None:
    """Guards against scores computed from the stored bytes, or without their scales."""
    make_oracle("deepseek_v32", tmp_path)
    plain = selection_quality(load_model(tmp_path), windows)
    rounded = selection_quality(load_model(tmp_path, index_dtype=index_dtype), windows)
    for one, other in zip(plain, rounded, strict=True):
        assert other.divergence.mean == pytest.approx(one.divergence.mean, rel=0.05)


def test_another_top_k(tmp_path: Path, windows: list[Window]) -> None:
    """More tokens keep more, and fewer queries have anything to choose."""
    make_oracle("deepseek_v32", tmp_path)
    model = load_model(tmp_path)
    few = selection_quality(model, windows)[0]
    with selecting(model, Selection("indexer", 48)):
        more = selection_quality(model, windows)[0]
    assert more.recall.mean > few.recall.mean + 0.2
    assert more.oracle.mean > few.oracle.mean
    assert more.recall.count == sum(len(window.ids) - 48 for window in windows)


def test_nothing_keeps_more_than_the_oracle(tmp_path: Path, windows: list[Window]) -> None:
    make_oracle("deepseek_v32", tmp_path)
    model = load_model(tmp_path)
    qualities = selection_quality(model, windows)
    for quality in qualities:
        for name in ("recall", "recency", "random"):
            assert getattr(quality, name).mean < quality.oracle.mean <= 1.0


def test_shared_selections_are_counted_once(tmp_path: Path, windows: list[Window]) -> None:
    """GLM's layers without an indexer select nothing of their own."""
    make_oracle("glm_moe_dsa", tmp_path)
    model = load_model(tmp_path)
    own = sum(isinstance(module, Block) and module.indexer is not None for module in model.modules())
    assert len(selection_quality(model, windows)) == own < len(model.layers)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    make_oracle("llama", tmp_path / "dense")
    make_oracle("deepseek_v32", tmp_path / "sparse")
    short = [Window(tuple(range(3, 3 + TOPK)), TOPK)]
    with pytest.raises(ValueError, match="no indexer"):
        selection_quality(load_model(tmp_path / "dense"), short)
    with pytest.raises(ValueError, match="must be longer"):
        selection_quality(load_model(tmp_path / "sparse"), short)
