"""Likelihoods against transformers, and what is made of them."""

from math import exp, log, sqrt
from pathlib import Path

import pytest
import torch
from oracle import make_oracle
from torch.nn.functional import cross_entropy

from foveal import load_model
from foveal.evaluate import perplexity
from foveal.evaluate.perplexity import by_position, default_edges, difference, token_losses, window_losses
from foveal.evaluate.prefill import Prefill
from foveal.evaluate.text import Window


@pytest.mark.parametrize("family", ["llama", "llama-dynamic", "mistral", "deepseek_v32", "glm_moe_dsa", "jamba"])
@pytest.mark.parametrize("chunk", [1000, 37])
def test_likelihoods_are_those_of_transformers(
    family: str, chunk: int, tmp_path: Path, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against targets off by one, and positions, states or selections that get lost between chunks or tiles."""
    monkeypatch.setattr(perplexity, "TILE_LOGITS", 128 * 11)  # tiles of 11 rows
    oracle = make_oracle(family, tmp_path)
    model = load_model(tmp_path)
    ids = windows[0].ids[: model.config.max_positions]
    with torch.no_grad():
        logits_NV = oracle(torch.tensor([ids[:-1]])).logits[0]  # dynamic rope counts the tokens that are seen
    expected = cross_entropy(logits_NV, torch.tensor(ids[1:]), reduction="none")
    losses = token_losses(Prefill(model, len(ids), chunk=chunk), ids)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=2e-4, rtol=1e-4)


def test_a_later_start_gives_the_last_losses(tmp_path: Path, windows: list[Window]) -> None:
    """Guards the rows that are kept of a chunk in which the first wanted position lies."""
    make_oracle("llama", tmp_path)
    prefill, ids = Prefill(load_model(tmp_path), 150, chunk=64), windows[0].ids
    torch.testing.assert_close(token_losses(prefill, ids, 70), token_losses(prefill, ids)[69:])


def test_windows_do_not_see_each_other(tmp_path: Path, windows: list[Window]) -> None:
    """Guards against keys or states that the window before has left in the cache."""
    make_oracle("jamba", tmp_path)
    model = load_model(tmp_path)
    done: list[int] = []
    together = window_losses(model, windows, done.append)
    assert done == [150, 97]
    torch.testing.assert_close(together[1], window_losses(model, windows[1:])[0])


def test_too_long_a_window_is_refused(tmp_path: Path) -> None:
    make_oracle("llama", tmp_path)
    with pytest.raises(ValueError, match="257 tokens are more than the model's 256"):
        Prefill(load_model(tmp_path), 257)


def test_buckets_hold_the_positions_they_say() -> None:
    """Position p is predicted from p tokens: the first loss is that of position 1."""
    result = by_position([torch.arange(1.0, 200.0)], [0, 10, 100, 1000])  # the loss at position p is p
    places = [(one.start, one.stop, one.nats.count) for one in result.buckets]
    assert places == [(1, 10, 9), (10, 100, 90), (100, 1000, 100)]
    assert [one.nats.mean for one in result.buckets] == [5.0, 54.5, 149.5]
    assert result.whole.nats.mean == 100.0
    assert (result.whole.start, result.whole.stop) == (1, 200)


def test_buckets_beyond_the_windows_are_left_out() -> None:
    assert [one.start for one in by_position([torch.ones(5)], [1, 4, 50, 60]).buckets] == [1, 4]


@pytest.mark.parametrize("edges", [[5], [3, 3], [4, 2], [-1, 5]])
def test_edges_that_do_not_rise_are_refused(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="rising"):
        by_position([torch.ones(5)], edges)


@pytest.mark.parametrize(("length", "expected"), [(10, [1, 10]), (64, [1, 64]), (200, [1, 64, 128, 200])])
def test_default_edges(length: int, expected: list[int]) -> None:
    assert default_edges(length) == expected


def test_the_error_is_that_of_independent_windows() -> None:
    """Guards the standard error: with windows of one length it is that of the windows' means."""
    generator = torch.Generator().manual_seed(0)
    losses = [torch.randn(50, generator=generator) + k for k in range(10)]
    result = by_position(losses).whole
    means = torch.stack([one.mean() for one in losses])
    assert result.nats.error == pytest.approx(float(means.std()) / sqrt(10), rel=1e-5)
    assert result.perplexity_error == pytest.approx(exp(result.nats.mean) * float(means.std()) / sqrt(10), rel=1e-5)
    assert result.as_dict()["bits"] == pytest.approx(result.nats.mean / log(2))


def test_one_window_is_cut_into_stretches() -> None:
    """Guards against an error of zero, or of independent tokens, where there is a single window."""
    losses = [torch.arange(4).float().repeat_interleave(64)]
    assert by_position(losses).whole.nats.error == pytest.approx(float(torch.arange(4.0).std()) / 2)
    assert by_position([torch.ones(20)]).whole.nats.error is None


def test_paired_differences_are_sharper() -> None:
    """Guards against errors of the two models added up, which hide any small difference."""
    generator = torch.Generator().manual_seed(0)
    base = [5 * torch.randn(64, generator=generator) for _ in range(20)]
    result = difference([one + 0.01 for one in base], base).whole
    assert result.nats.mean == pytest.approx(0.01, abs=1e-5)
    assert result.perplexity == pytest.approx(exp(0.01), abs=1e-5)
    assert result.nats.error is not None and result.nats.error < 1e-5
