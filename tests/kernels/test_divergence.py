"""The indexer's loss against its reference in float64, value and gradients."""

import pytest
import torch
from packing import CASES, make_queries, random_selection
from torch import Tensor

from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows, index_divergence
from foveal.kernels import divergence as module

CONTEXT_CASES = [(case, selects) for case in CASES for selects in (False, True)]


def make(case: str, selects: bool, dtype: torch.dtype = torch.float64):
    counts, lengths = CASES[case]
    torch.manual_seed(len(case))
    learned = [
        torch.randn(*shape, dtype=dtype, requires_grad=True)
        for shape in ((sum(counts), 5, 8), (sum(counts), 5), (sum(lengths), 8))
    ]
    q, k = torch.randn(sum(counts), 6, 7, dtype=dtype), torch.randn(sum(lengths), 2, 7, dtype=dtype)
    contexts, queries = Contexts.packed(lengths), make_queries(counts, lengths)
    weights = torch.rand(sum(counts), dtype=dtype)
    weights[1::3] = 0
    selection = random_selection(counts, lengths, 6) if selects else None

    def run(q_TIJ: Tensor, weights_TI: Tensor, k_RJ: Tensor, version: str = "tiled"):
        index_keys, keys = KeySource(Rows(k_RJ), contexts), KeySource(Rows(k), contexts)
        return index_divergence(
            *(q_TIJ, weights_TI, index_keys, q, keys, queries, weights),
            scale=0.4,
            selection_TK=selection,
            version=version,
        )

    return learned, run


@pytest.mark.parametrize(("case", "selects"), CONTEXT_CASES)
def test_reference(case: str, selects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that miss a key, count one twice, or mix sequences; a gradient for the wrong row."""
    monkeypatch.setattr(module, "TILE_SCORES", 2000)
    learned, run = make(case, selects)
    loss, divergence = run(*learned)
    expected_loss, expected = run(*learned, version="reference")
    torch.testing.assert_close(divergence, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-12)
    gradients, wanted = (torch.autograd.grad(3 * x, learned) for x in (loss, expected_loss))
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("selects", [False, True])
def test_all_are_asked(selects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: a token of weight 0 that counts, or that has a divergence."""
    learned, run = make("prefill", selects)
    results = []
    for asked in (module._asked, lambda weights_T: torch.arange(len(weights_T))):
        monkeypatch.setattr(module, "_asked", asked)
        loss, divergence = run(*learned)
        results.append((loss, divergence, *torch.autograd.grad(loss, learned)))
    assert not results[0][1].all()
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("selects", [False, True])
def test_finite_differences(selects: bool) -> None:
    """A wrong gradient in both the tiled form and autograd's."""
    learned, run = make("one", selects)
    assert torch.autograd.gradcheck(lambda *x: run(*x)[0], learned)


@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, selects: bool) -> None:
    """Softmax or sums in a narrow type."""
    learned, run = make("prefill", selects, dtype)
    loss, divergence = run(*learned)
    assert divergence.dtype == loss.dtype == torch.float32
    _, expected = run(*[x.detach().float() for x in learned], version="reference")
    torch.testing.assert_close(divergence.double(), expected.double(), rtol=1e-3, atol=1e-4)
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(loss, learned))


def test_a_perfect_indexer_has_no_loss() -> None:
    """A target that is not what attention computes: with one head and positive scores the two agree exactly."""
    q, k = torch.rand(9, 1, 4, dtype=torch.float64), torch.rand(9, 4, dtype=torch.float64)
    contexts, queries = Contexts.packed([9]), Queries((0, 9), (0,))
    keys = KeySource(OneHead(Rows(k)), contexts)
    weights = torch.full((9, 1), 0.7, dtype=torch.float64)
    loss, divergence = index_divergence(
        *(q, weights, KeySource(Rows(k), contexts), q, keys, queries, torch.ones(9, dtype=torch.float64)), scale=0.7
    )
    assert loss.abs() < 1e-12 and divergence.abs().max() < 1e-12


def test_latent_keys_and_nothing_selected() -> None:
    """Latent rows as the target's keys; a token without a selection giving NaN."""
    q_TIJ, weights, k_RJ = (torch.randn(*shape, requires_grad=True) for shape in ((3, 2, 4), (3, 2), (3, 4)))
    contexts = Contexts.packed([3])
    keys = KeySource(Columns(OneHead(Rows(torch.randn(3, 8))), 6), contexts)
    selection = torch.tensor([[-1, -1], [0, -1], [0, 2]], dtype=torch.int32)
    loss, divergence = index_divergence(
        *(q_TIJ, weights, KeySource(Rows(k_RJ), contexts), torch.randn(3, 4, 6), keys, Queries((0, 3), (0,))),
        torch.ones(3),
        scale=1.0,
        selection_TK=selection,
    )
    assert divergence[0] == 0 and divergence[1].abs() < 1e-6 and divergence[2] > 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [q_TIJ, weights, k_RJ]))


@pytest.mark.parametrize(("case", "selects"), CONTEXT_CASES)
def test_tokens_of_weight_0_are_not_looked_at(case: str, selects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that takes a neighbour's query or key limit for the one that counts; work for those that do not."""
    monkeypatch.setattr(module, "TILE_SCORES", 2000)
    counts, lengths = CASES[case]
    q_TIJ, weights_TI, q_THP = (
        torch.randn(sum(counts), 5, 8),
        torch.randn(sum(counts), 5),
        torch.randn(sum(counts), 6, 7),
    )
    asked_T = torch.rand(sum(counts)) < 0.4
    contexts, queries = Contexts.packed(lengths), make_queries(counts, lengths)
    index_keys = KeySource(Rows(torch.randn(sum(lengths), 8)), contexts)
    keys = KeySource(Rows(torch.randn(sum(lengths), 2, 7)), contexts)
    selection = random_selection(counts, lengths, 6) if selects else None

    def run(q_TIJ: Tensor, token_weights_T: Tensor) -> tuple[Tensor, Tensor]:
        return index_divergence(
            *(q_TIJ, weights_TI, index_keys, q_THP, keys, queries, token_weights_T),
            scale=0.4,
            selection_TK=selection,
            version="tiled",
        )

    loss, divergence_T = run(q_TIJ.where(asked_T[:, None, None], torch.nan), asked_T.float())
    _, of_all_T = run(q_TIJ, torch.ones(sum(counts)))
    torch.testing.assert_close(divergence_T, of_all_T.where(asked_T, 0.0))
    torch.testing.assert_close(loss, divergence_T.sum())
