"""Kernels against their references in float64, on random inputs: packed and paged, with windows and selections."""

import pytest
import torch
from packing import CASES, close, make_queries, random_selection, source
from torch import Tensor

from foveal.kernels import Contexts, KeySource, Rows, attention, sparse_attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 17])
def test_attention(case: str, paged: bool, window: int | None, dtype: torch.dtype) -> None:
    """A wrong causal edge, window edge, page lookup, or padded row that leaks into the softmax."""
    counts, lengths = CASES[case]
    queries = make_queries(counts, lengths)
    q, k, v = (
        torch.randn(n, h, p).to(dtype) for n, h, p in ((sum(counts), 6, 8), (sum(lengths), 2, 8), (sum(lengths), 2, 8))
    )
    result = attention(
        q,
        source(list(k.split(lengths)), paged),
        source(list(v.split(lengths)), paged),
        queries,
        scale=0.3,
        window=window,
    )
    expected = attention(
        q.double(),
        source(list(k.double().split(lengths)), False),
        source(list(v.double().split(lengths)), False),
        queries,
        scale=0.3,
        window=window,
        version="reference",
    )
    close(result, expected)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sinks", [1, 12, 66])
def test_sinks(case: str, paged: bool, sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks that fall out of the window or are counted twice where it covers them; one tile of queries or several."""
    counts, lengths = CASES[case]
    queries = make_queries(counts, lengths)
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (sum(counts), sum(lengths), sum(lengths)))
    keys, values = (source(list(x.split(lengths)), paged) for x in (k, v))
    plain_keys, plain_values = (source(list(x.split(lengths)), False) for x in (k, v))
    arguments = {"scale": 0.3, "window": 17, "sinks": sinks}
    expected = attention(q, plain_keys, plain_values, queries, **arguments, version="reference")
    # Row by row: what stands in the window or among the first.
    for s, (row, count, first) in enumerate(queries):
        for t in range(count):
            seen = [j for j in range(first + t + 1) if j < sinks or j > first + t - 17]
            weights = (
                torch.einsum("hp,nhp->hn", q[row + t], plain_keys.context(s, 0, lengths[s])[seen]) * 0.3
            ).softmax(1)
            value = torch.einsum("hn,nhp->hp", weights, plain_values.context(s, 0, lengths[s])[seen])
            close(expected[row + t], value)
    close(attention(q, keys, values, queries, **arguments, version="torch"), expected)
    monkeypatch.setattr("foveal.kernels.dense.TILE_SCORES", 1000)
    close(attention(q, keys, values, queries, **arguments, version="torch"), expected)


def test_selection_and_window() -> None:
    """What was selected but lies before the window being seen, or written past the mask."""
    counts, lengths = CASES["chunk"]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 30)
    selection[:, 0], selection[:, 1] = 0, 1
    selection[:, 2:] = torch.where(selection[:, 2:] > 1, selection[:, 2:], -1)
    selection = torch.where(selection < 0, 1 << 20, selection).sort(1).values
    selection = torch.where(selection == 1 << 20, -1, selection).int()
    q, k = torch.randn(sum(counts), 2, 8, dtype=torch.float64), torch.randn(sum(lengths), 2, 8, dtype=torch.float64)
    keys = source(list(k.split(lengths)), False)
    arguments = {"scale": 0.3, "window": 17, "sinks": 2, "selection_TK": selection}
    expected = attention(q, keys, keys, queries, **arguments, version="reference")
    close(attention(q, keys, keys, queries, **arguments, version="torch"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_masked_attention(case: str, dtype: torch.dtype) -> None:
    """The masked form seeing a key that was not selected or lies in the future; values narrower than keys."""
    counts, lengths = CASES[case]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 6)
    q, k, v = (torch.randn(n, 3, p).to(dtype) for n, p in ((sum(counts), 8), (sum(lengths), 8), (sum(lengths), 5)))
    arguments = {"scale": 0.3, "selection_TK": selection}
    keys, values = (source(list(x.split(lengths)), True) for x in (k, v))
    result = attention(q, keys, values, queries, **arguments)
    keys, values = (source(list(x.double().split(lengths)), False) for x in (k, v))
    close(result, attention(q.double(), keys, values, queries, **arguments, version="reference"))


def test_gradients() -> None:
    """A fast version that loses or bends a gradient."""
    counts, lengths = [9, 30], [9, 30]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 5)
    q = torch.randn(39, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(39, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(39, 4, 6, dtype=torch.float64)
    grads: dict[str, list[Tensor]] = {}
    for version in ("reference", "torch"):
        keys, values = (KeySource(Rows(x), Contexts.packed(lengths)) for x in (k, v))
        dense = attention(q, keys, values, queries, scale=0.4, version=version)
        sparse = sparse_attention(q, keys, values, selection, queries, scale=0.4, version=version)
        grads[version] = list(torch.autograd.grad(((dense + sparse) * weight).sum(), (q, k, v)))
    for result, expected in zip(grads["torch"], grads["reference"], strict=True):
        close(result, expected)


def test_versions() -> None:
    """A forced version that does not exist being replaced quietly."""
    q = torch.randn(1, 2, 4)
    keys = KeySource(Rows(torch.randn(1, 2, 4)), Contexts.packed([1]))
    with pytest.raises(ValueError, match="no version 'fast'"):
        attention(q, keys, keys, make_queries([1], [1]), scale=1.0, version="fast")
