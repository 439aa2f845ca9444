"""Optimisers and schedules."""

from itertools import pairwise

import pytest
import torch
from tiny import sparse_decoder
from torch import nn

from foveal.train.learner import Learner
from foveal.train.optim import Masters, Muon, learning_rate_scale, matrices, orthogonal
from foveal.train.schema import StageSettings


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5), (3, 8, 4)])
def test_orthogonal(shape: tuple[int, ...]) -> None:
    """An iteration that leaves singular values far from 1, or mixes the matrices of a stack."""
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    aligned = (orthogonal(matrix) * (u @ v)).sum((-2, -1)) / min(shape[-2:])
    assert aligned.min() > 0.7


def test_muon_descends() -> None:
    """A sign error: a linear fit must get better, and decay must pull weights to zero where there is no gradient."""
    target, weight = torch.randn(8, 6), nn.Parameter(torch.zeros(8, 6))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.0)
    first = float((weight - target).square().sum())
    for _ in range(60):
        (weight - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float((weight - target).square().sum()) < 0.1 * first


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_schedule(kind: str) -> None:
    """A jump where warm-up ends, a last step above the floor, a rate above the highest."""
    scales = [learning_rate_scale(kind, step, 100, warmup=10, decay=0.2, floor=0.1) for step in range(100)]
    assert scales[0] == pytest.approx(0.1) and scales[9] == pytest.approx(1) and max(scales) <= 1
    assert scales[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(abs(a - b) < 0.11 for a, b in pairwise(scales))
    if kind == "wsd":
        assert scales[79] == pytest.approx(1) and scales[80] < 1
    assert learning_rate_scale(kind, 0, 1, warmup=0, decay=1.0, floor=0.0) in (0.0, 1.0)


def test_masters_keep_small_updates() -> None:
    """Updates that bfloat16 rounds away, one by one, must add up."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters({"p": parameter})
    optimizer = torch.optim.SGD(masters.by_name.values(), lr=1e-3)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        masters.take_gradients()
        optimizer.step()
        masters.give_back()
    torch.testing.assert_close(parameter.float(), torch.full((4,), 0.95), rtol=0, atol=4e-3)
    assert parameter.grad is None and [name for name, _ in masters.copies()] == ["p"]
    wide = nn.Parameter(torch.ones(2))
    assert Masters({"w": wide}).by_name["w"] is wide


def settings(kind: str, **more: object) -> StageSettings:
    return StageSettings(kind=kind, steps=4, context=8, tokens_per_step=8, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "indexers", "others"), [("pretrain", False, True), ("warmup", True, False), ("sparse", True, True)]
)
def test_who_learns(kind: str, indexers: bool, others: bool) -> None:
    """A stage that teaches what it should leave alone; the routers' biases never have a gradient."""
    decoder = sparse_decoder(torch.float32)
    Learner(decoder, settings(kind))
    for name, parameter in decoder.named_parameters():
        wanted = indexers if ".indexer." in name else others
        assert parameter.requires_grad == (wanted and "correction_bias" not in name), name


def test_groups() -> None:
    """Decay on norms or embeddings, embeddings under Muon, or a parameter that is in no group or in two."""
    decoder = sparse_decoder(torch.float32)
    learner = Learner(decoder, settings("sparse", optimizer="muon", learning_rate=0.5, indexer_learning_rate=0.25))
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    seen: list[str] = []
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                seen.append(name)
                assert group["lr"] == (0.25 if ".indexer." in name else 0.5)
                assert (group["weight_decay"] == 0) == ("norm" in name or "embed" in name)
                assert isinstance(optimizer, Muon) == (parameter in matrices(decoder))
    assert sorted(seen) == sorted(n for n, p in decoder.named_parameters() if p.requires_grad)


def test_a_gradient_that_is_not_finite() -> None:
    """A run that goes on with NaN weights."""
    decoder = sparse_decoder(torch.float32)
    learner = Learner(decoder, settings("pretrain"))
    decoder.norm.weight.grad = torch.full_like(decoder.norm.weight, torch.nan)
    before = decoder.norm.weight.clone()
    with pytest.raises(FloatingPointError, match="step 3"):
        learner.update(3, {})
    assert torch.equal(before, decoder.norm.weight)


def test_heads_are_not_for_muon() -> None:
    """A head, whose rows are tokens, made orthogonal as a matrix between hidden states is."""
    decoder = sparse_decoder(torch.float32, tie_word_embeddings=False)
    found = matrices(decoder)
    assert decoder.lm_head.weight not in found and decoder.embed_tokens.weight not in found
    assert decoder.layers[0].blocks[0].operation.o_proj.weight in found
