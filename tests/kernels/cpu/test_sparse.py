"""The compiled grouped-query attention over a selection against the reference in float64."""

import pytest
import torch
from compiled import each_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import CASES, make_queries, random_selection, source
from torch import Tensor

from foveal.kernels import Contexts, KeySource, Rows, sparse_attention
from foveal.kernels.cpu.sparse import _accepts

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
# (heads, groups, key width, value width): every remainder of heads, registers filled and not.
SHAPES = [(3, 3, 1, 1), (6, 2, 8, 5), (8, 1, 64, 64), (15, 3, 37, 100), (14, 2, 128, 128), (4, 2, 17, 31)]


def sources(keys: Tensor, values: Tensor, lengths: list[int]) -> tuple[KeySource, KeySource]:
    """Keys and values behind one page table; what no sequence owns is NaN."""
    both = source(list(torch.cat((keys, values), -1).split(lengths)), paged=True)
    assert isinstance(both.records, Rows)
    parts = both.records.values.split([keys.shape[-1], values.shape[-1]], -1)
    first, second = (KeySource(Rows(part.contiguous()), both.contexts) for part in parts)
    return first, second


def check(
    isa: str, counts: list[int], lengths: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype, k: int
):
    """One call beside the reference, on random numbers, with a selection of at most k."""
    heads, groups, width, value_width = shape
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, k)
    q = torch.randn(sum(counts), heads, width).to(dtype)
    keys, values = (torch.randn(sum(lengths), groups, size).to(dtype) for size in (width, value_width))
    scale = 2 * width**-0.5
    result = sparse_attention(q, *sources(keys, values, lengths), selection, queries, scale=scale, version=isa)
    exact = sources(keys.double(), values.double(), lengths)
    expected = sparse_attention(q.double(), *exact, selection, queries, scale=scale, version="reference")
    assert result.dtype == dtype and result.shape == (sum(counts), heads, value_width)
    error = (result.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], error


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are not written are NaN."""
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype=None: torch.full(shape, torch.nan, dtype=dtype))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_shapes(isa: str, case: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Heads or numbers that do not fill a register; another group's rows; a tile that is not full."""
    check(isa, *CASES[case], shape, dtype, 70)


@each_isa
@pytest.mark.parametrize("k", [1, 63, 64, 65, 600, 1290])
def test_long_selections(isa: str, k: int) -> None:
    """Tiles and ranges of a selection that begin or end in the wrong place."""
    check(isa, [2, 1], [1300, 700], (6, 2, 24, 20), torch.float32, k)


@each_isa
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_call(isa: str, data: st.DataObject) -> None:
    """Whatever the cases above leave out."""
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any))
    lengths = [count + data.draw(st.integers(0, 150)) for count in counts]
    groups = data.draw(st.integers(1, 4))
    heads = groups * data.draw(st.integers(1, 9))
    shape = (heads, groups, data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    check(isa, counts, lengths, shape, data.draw(st.sampled_from(list(TOLERANCE))), data.draw(st.integers(1, 90)))


@each_isa
def test_scores_far_apart(isa: str) -> None:
    """A maximum that is not brought up to date."""
    k = torch.randn(200, 1, 8)
    k[:, 0, 7] = torch.linspace(0, 300, 200)
    selection, queries = torch.arange(200, dtype=torch.int32)[None], make_queries([1], [200])
    q = torch.ones(1, 3, 8)
    result = sparse_attention(q, *sources(k, k[..., :7], [200]), selection, queries, scale=1.0, version=isa)
    exact = sources(k.double(), k[..., :7].double(), [200])
    expected = sparse_attention(q.double(), *exact, selection, queries, scale=1.0, version="reference")
    assert (result.double() - expected).norm() < 1e-4 * expected.norm()  # scores of 300 in float32


@each_isa
def test_threads_change_nothing(isa: str) -> None:
    """A cut, or an order of summing, that follows the number of threads."""
    keys, values = sources(torch.randn(1500, 2, 16), torch.randn(1500, 2, 16), [1500])
    q, selection, queries = torch.randn(1, 6, 16), torch.arange(1500)[None].int(), make_queries([1], [1500])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sparse_attention(q, keys, values, selection, queries, scale=0.1, version=isa))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_isa
def test_nothing_selected(isa: str) -> None:
    """A query without any entry that is left unwritten, or turned into NaN."""
    keys, values = sources(torch.randn(9, 2, 6), torch.randn(9, 2, 7), [9])
    selection = torch.tensor([[-1, -1], [3, -1]], dtype=torch.int32)
    q = torch.randn(2, 4, 6)
    result = sparse_attention(q, keys, values, selection, make_queries([2], [9]), scale=1.0, version=isa)
    assert (result[0] == 0).all()
    torch.testing.assert_close(result[1], values.context(0, 3, 4)[0].repeat_interleave(2, 0))


@each_isa
def test_bad_arguments_are_refused(isa: str) -> None:
    """Reading past the end of keys, values or a selection."""
    keys, values = sources(torch.randn(9, 2, 6), torch.randn(9, 2, 7), [9])
    queries = make_queries([2], [9])

    def run(q: Tensor, row: list[int]) -> None:
        selection = torch.tensor([[0, 8], row][: len(q)], dtype=torch.int32)
        sparse_attention(q, keys, values, selection, queries, scale=1.0, version=isa)

    with pytest.raises(ValueError, match="query 1 has position 9, but its sequence has 9 keys"):
        run(torch.randn(2, 4, 6), [0, 9])
    with pytest.raises(ValueError, match="query 1 has position 4 after a -1"):
        run(torch.randn(2, 4, 6), [-1, 4])
    with pytest.raises(ValueError, match="do not belong together"):
        run(torch.randn(2, 3, 6), [0, 1])
    with pytest.raises(ValueError, match="do not belong together"):
        run(torch.randn(2, 4, 5), [0, 1])
    with pytest.raises(ValueError, match="queries of 1 sequences, but contexts of 2"):
        several = KeySource(keys.records, Contexts((9, 9), (64, 64)))
        selection = torch.zeros(2, 1, dtype=torch.int32)
        values_too = KeySource(values.records, several.contexts)
        sparse_attention(torch.randn(2, 4, 6), several, values_too, selection, queries, scale=1.0, version=isa)
    with pytest.raises(ValueError, match=r"selection has shape \(2, 0\)"):
        nothing = torch.zeros(2, 0, dtype=torch.int32)
        sparse_attention(torch.randn(2, 4, 6), keys, values, nothing, queries, scale=1.0, version=isa)
    with pytest.raises(ValueError, match="1 queries, but their sequences own"):
        run(torch.randn(1, 4, 6), [0, 1])
    with pytest.raises(ValueError, match="selection has shape"):
        run(torch.randn(3, 4, 6), [0, 1])


def test_what_is_left_to_torch() -> None:
    """Keys and values of different tables, or rows that need gradients, being read as if they were not."""
    q, queries, selection = torch.randn(1, 4, 6), make_queries([1], [9]), torch.zeros(1, 1, dtype=torch.int32)
    keys, values = sources(torch.randn(9, 2, 6), torch.randn(9, 2, 7), [9])
    assert _accepts(q, keys, values, selection, queries, scale=1.0)
    assert not _accepts(q, keys, values, selection.long(), queries, scale=1.0)
    assert not _accepts(q.double(), keys, values, selection, queries, scale=1.0)
    assert not _accepts(q, keys, source([torch.randn(9, 2, 7)], True), selection, queries, scale=1.0)
    learnt = KeySource(Rows(torch.randn(128, 2, 7, requires_grad=True)), keys.contexts)
    assert not _accepts(q, keys, learnt, selection, queries, scale=1.0)
