"""The compiled score-and-select against scores in float64 and a stable sort of them."""

from collections.abc import Iterator

import pytest
import torch
from compiled import each_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import CASES, make_queries, source
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels import Contexts, KeySource, Queries, Rows, quantise_index, select
from foveal.kernels.records import IndexKeyRecords

# What queries are given as, and what keys are stored as.
FORMATS = [
    (torch.float32, "float32"),
    (torch.bfloat16, "bfloat16"),
    (torch.float32, "bfloat16"),
    (torch.bfloat16, "float32"),
    (torch.float8_e4m3fn, "fp8"),
    (torch.float32, "fp8"),
    (torch.int8, "int8"),
]
each_format = pytest.mark.parametrize(("asked", "stored"), FORMATS)
# The same with whether keys are paged; records always are.
PLACED = [(*kinds, paged) for kinds in FORMATS for paged in (True, False) if paged or kinds[1] not in ("fp8", "int8")]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_numbers(*shape: int) -> Tensor:
    """Whole numbers that every format holds exactly, so that scores are exact and many are equal."""
    return torch.randint(-3, 4, shape).float()


def records(keys: list[Tensor], scales: list[Tensor], stored: str) -> KeySource:
    """Keys of each sequence as they are, scattered over a shuffled cache whose other rows are NaN, or nearly."""
    counts = [-(-len(key) // PAGE_SIZE) for key in keys]
    size = keys[0].shape[1]
    pages = torch.full((sum(counts) + 1, PAGE_SIZE * (size + 4)), 0x7F, dtype=torch.uint8)
    cache = IndexKeyRecords(pages, size, stored)
    cache.scales.fill_(torch.nan)
    order = (torch.randperm(sum(counts)) + 1).tolist()
    table_SB = torch.zeros(len(keys), max(counts), dtype=torch.int64)
    eight = torch.int8 if stored == "int8" else torch.float8_e4m3fn
    for s, (key, scale, count) in enumerate(zip(keys, scales, counts, strict=True)):
        table_SB[s, :count] = torch.tensor([order.pop() for _ in range(count)])
        positions = torch.arange(len(key))
        page, place = table_SB[s, positions // PAGE_SIZE], positions % PAGE_SIZE
        cache.values[page, place] = key.to(eight).view(torch.uint8)
        cache.scales[page, place] = scale
    return KeySource(cache, Contexts.paged(table_SB, [len(key) for key in keys]))


def expect(scores_TN: Tensor, first: int, topk: int) -> list[list[int]]:
    """The selection of queries from position `first` on, by sorting."""
    rows = []
    for t, score_N in enumerate(scores_TN):
        chosen = score_N[: first + t + 1].argsort(descending=True, stable=True)[:topk].sort().values.tolist()
        rows.append(chosen + [-1] * (topk - len(chosen)))
    return rows


def exact_scores(q_TIJ: Tensor, weights_TI: Tensor, k_NJ: Tensor) -> Tensor:
    return torch.einsum("ti,tin->tn", weights_TI.double(), torch.relu(q_TIJ.double() @ k_NJ.double().T))


@each_isa
@pytest.mark.parametrize(("asked", "stored", "paged"), PLACED)
@pytest.mark.parametrize("case", [*CASES, "long"])
@pytest.mark.parametrize(("heads", "size", "topk"), [(3, 4, 7), (17, 33, 40), (64, 128, 64), (70, 8, 9), (100, 66, 9)])
def test_select(
    isa: str, case: str, paged: bool, asked: torch.dtype, stored: str, heads: int, size: int, topk: int
) -> None:
    """A key of another row or page, a key of the future, NaN from rows that are nobody's, a head or a number past the
    end that counts, a scale left out, ties given to the wrong position: scores are exact, and many are equal."""
    counts, lengths = ([2, 5], [700, 300]) if case == "long" else CASES[case]
    q, keys = small_numbers(sum(counts), heads, size), [small_numbers(length, size) for length in lengths]
    weights = small_numbers(sum(counts), heads)
    scales = [2.0 ** torch.randint(-1, 2, (length,)) for length in lengths]
    if stored in ("fp8", "int8"):
        found = records(keys, scales, stored)
        keys = [key * scale[:, None] for key, scale in zip(keys, scales, strict=True)]
    else:
        found = source([key.to(getattr(torch, stored)) for key in keys], paged)
    queries = make_queries(counts, lengths)
    result = select(q.to(asked), weights, found, queries, topk=topk, version=isa)
    assert result.dtype == torch.int32 and result.shape == (sum(counts), topk)
    for s, (row, count, first) in enumerate(queries):
        rows = slice(row, row + count)
        expected = expect(exact_scores(q[rows], weights[rows], keys[s]), first, topk)
        assert result[rows].tolist() == expected


def select_scores(scores_N: Tensor, topk: int, isa: str) -> Tensor:
    """The selection of one query at the end whose scores are these: two heads, k and -k, before and after ReLU."""
    q_TIJ, weights_TI = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[1.0, -1.0]])
    keys = KeySource(Rows(scores_N[:, None]), Contexts.packed([len(scores_N)]))
    return select(q_TIJ, weights_TI, keys, Queries((0, 1), (len(scores_N) - 1,)), topk=topk, version=isa)[0]


LENGTH = 9001
SCORES = {
    "rising": torch.arange(LENGTH).float(),
    "falling": -torch.arange(LENGTH).float(),
    "equal": torch.full((LENGTH,), 3.0),
    "zeros of both signs": torch.where(torch.arange(LENGTH) % 2 == 0, 0.0, -0.0),
    "steps": (torch.arange(LENGTH) // 1000).float(),
    "negative": -torch.rand(LENGTH),
    "neighbours": 1.0 + torch.randint(0, 40, (LENGTH,)) * 2**-23,
    "every magnitude": torch.randn(LENGTH) * 10.0 ** torch.randint(-30, 31, (LENGTH,)),
    "denormal": torch.randint(-9, 9, (LENGTH,)) * 2.0**-149,
}


@each_isa
@pytest.mark.parametrize("topk", [1, 33, 2500, 8999])
@pytest.mark.parametrize("kind", SCORES)
def test_contexts_longer_than_what_is_kept(isa: str, kind: str, topk: int) -> None:
    """A running top-k that loses a position when it is brought up to date, ranks what it should not, or breaks ties
    otherwise than by position; scores whose digits are all alike or all different."""
    assert select_scores(SCORES[kind], topk, isa).tolist() == expect(SCORES[kind][None], LENGTH - 1, topk)[0]


@each_isa
@given(data=st.data(), topk=st.integers(1, 60), values=st.integers(1, 50), length=st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_any_scores(isa: str, data: st.DataObject, topk: int, values: int, length: int) -> None:
    """A combination of ties, lengths and topk that the other tests do not have."""
    seed = data.draw(st.integers(0, 2**31))
    scores = torch.randint(0, values, (length,), generator=torch.Generator().manual_seed(seed)).float() - values // 2
    assert select_scores(scores, topk, isa).tolist() == expect(scores[None], length - 1, topk)[0]


@each_isa
@pytest.mark.parametrize("stored", ["fp8", "int8"])
def test_threads_change_nothing(isa: str, stored: str, threads: None) -> None:
    """Parts of a context merged in the order in which they finish, or scores that depend on where a part begins."""
    counts, lengths = [1, 3, 70], [9000, 100, 5000]
    q, k = torch.randn(sum(counts), 16, 32), [torch.randn(length, 32) for length in lengths]
    cache = IndexKeyRecords.of(torch.cat(k), stored)
    keys, queries = KeySource(cache, Contexts.packed(lengths)), make_queries(counts, lengths)
    values, scale = quantise_index(q, stored)
    weights = torch.randn(sum(counts), 16) * scale
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(select(values, weights, keys, queries, topk=300, version=isa))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_isa
@each_format
def test_close_to_float64(isa: str, asked: torch.dtype, stored: str) -> None:
    """Sums in less than float32: what is selected otherwise than in float64 must be on the edge. Every code of e4m3."""
    q, k, weights = torch.randn(6, 40, 128), torch.randn(900, 128), torch.rand(6, 40)
    if stored in ("fp8", "int8"):
        if stored == "fp8":
            k = torch.randint(0, 0x7F, (900, 128), dtype=torch.uint8).view(torch.float8_e4m3fn).float()
            k *= torch.randint(0, 2, k.shape) * 2 - 1
        else:
            k = torch.randint(-127, 128, (900, 128)).float()
            q = torch.randint(-127, 128, q.shape).float()
        keys = records([k], [torch.ones(900)], stored)
    else:
        k = k.to(getattr(torch, stored))
        keys = KeySource(Rows(k), Contexts.packed([900]))
    q = q.to(asked)
    result = select(q, weights, keys, Queries((0, 6), (894,)), topk=100, version=isa)
    scores = exact_scores(q, weights, k)
    for t in range(6):
        seen = scores[t, : 895 + t]
        best = seen.topk(100)
        missed = set(result[t].tolist()) ^ set(best.indices.tolist())
        assert all(abs(seen[n] - best.values[-1]) < 1e-5 * seen.abs().max() for n in missed)


@each_isa
def test_no_queries(isa: str) -> None:
    """A batch, or a sequence of it, without queries."""
    keys = KeySource(Rows(torch.randn(10, 4)), Contexts.packed([4, 6]))
    nothing = select(torch.randn(0, 2, 4), torch.randn(0, 2), keys, Queries((0, 0, 0), (4, 6)), topk=3, version=isa)
    assert nothing.shape == (0, 3)
    some = select(torch.randn(1, 2, 4), torch.randn(1, 2), keys, Queries((0, 0, 1), (4, 5)), topk=3, version=isa)
    assert (some[0].diff() > 0).all()


@each_isa
def test_refusals(isa: str) -> None:
    """A page that does not exist, a query past its keys or sizes that do not match being read all the same."""
    q, weights, keys = torch.randn(1, 2, 4), torch.randn(1, 2), Rows(torch.randn(128, 4))
    one = Queries((0, 1), (99,))

    def run(q: Tensor, weights: Tensor, contexts: Contexts, queries: Queries) -> None:
        select(q, weights, KeySource(keys, contexts), queries, topk=3, version=isa)

    good = Contexts((100,), (-1,), torch.tensor([[1, 0]]))
    run(q, weights, good, one)
    with pytest.raises(ValueError, match="names page 2"):
        run(q, weights, Contexts((100,), (-1,), torch.tensor([[1, 2]])), one)
    with pytest.raises(ValueError, match="more pages than its table"):
        run(q, weights, Contexts((100,), (-1,), torch.tensor([[1]])), one)
    with pytest.raises(ValueError, match="keys past row 128"):
        run(q, weights, Contexts((100,), (60,)), one)
    with pytest.raises(ValueError, match="only 100 keys"):
        run(q, weights, good, Queries((0, 1), (100,)))
    with pytest.raises(ValueError, match="queries, but their sequences own"):
        run(q, weights, good, Queries((0, 2), (98,)))
    with pytest.raises(ValueError, match="queries have 3 numbers, keys 4"):
        run(q[..., :3], weights, good, one)
    with pytest.raises(ValueError, match="weights have shape"):
        run(q, weights[:, :1], good, one)
    narrow = KeySource(IndexKeyRecords(torch.zeros(2, PAGE_SIZE * 7, dtype=torch.uint8), 4, "fp8"), good)
    with pytest.raises(ValueError, match="pages of 512 bytes do not fit"):
        select(q, weights, narrow, one, topk=3, version=isa)
