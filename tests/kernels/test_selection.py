"""Index scores and selection: exact top-k, ties to the lower position, whatever the tiling."""

import pytest
import torch
from packing import CASES, make_queries, source

from foveal.kernels import KeySource, Queries, Rows, select
from foveal.kernels import selection as module
from foveal.kernels.keys import Contexts
from foveal.kernels.selection import first_of_the_highest


@pytest.mark.parametrize("stretch", [16, 8192])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_select(case: str, paged: bool, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running top-k that loses a position between stretches of context, or sees the future."""
    monkeypatch.setattr(module, "STRETCH", stretch)
    counts, lengths = CASES[case]
    queries = make_queries(counts, lengths)
    q, k = torch.randn(sum(counts), 16, 8), torch.randn(sum(lengths), 8)
    weights = torch.randn(sum(counts), 16)
    result = select(q, weights, source(list(k.split(lengths)), paged), queries, topk=7)
    keys = source(list(k.split(lengths)), False)
    assert torch.equal(result, select(q, weights, keys, queries, topk=7, version="reference"))
    assert result.dtype == torch.int32


@pytest.mark.parametrize("stretch", [16, 8192])
def test_ties_go_to_the_lower_position(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.topk` choosing among equal scores as it likes: whole-number scores make many ties, exactly."""
    monkeypatch.setattr(module, "STRETCH", stretch)
    q = torch.randint(-1, 2, (50, 2, 3)).float()
    k = torch.randint(-1, 2, (50, 3)).float()
    weights = torch.randint(-1, 2, (50, 2)).float()
    keys, queries = KeySource(Rows(k), Contexts.packed([50])), Queries((0, 50), (0,))
    result = select(q, weights, keys, queries, topk=9)
    for t in range(50):
        scores = (torch.relu(q[t] @ k[: t + 1].T) * weights[t][:, None]).sum(0)
        expected = sorted(sorted(range(t + 1), key=lambda n: (-scores[n].item(), n))[:9])
        assert result[t].tolist() == expected + [-1] * (9 - len(expected))


def test_first_of_the_highest() -> None:
    """Minus infinity being chosen, or rows with fewer valid places than topk shifting into each other."""
    inf = float("-inf")
    scores = torch.tensor([[1.0, 1, 1, 1], [inf, 3, inf, inf], [inf] * 4, [0, -0.0, 5, 0]])
    assert first_of_the_highest(scores, 2).tolist() == [[0, 1], [1, -1], [-1, -1], [0, 2]]
