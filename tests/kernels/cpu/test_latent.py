"""The compiled absorbed latent attention against the reference in float64: dense and over a selection."""

import pytest
import torch
from compiled import each_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import CASES, make_queries, random_selection, source
from torch import Tensor

from foveal.config.formats import latent_bytes
from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows, attention, sparse_attention
from foveal.kernels.cpu.latent import latent_rows, serves
from foveal.kernels.keys import Records
from foveal.kernels.records import LatentRecords

FORMATS = ("float32", "bfloat16", "fp8")
# Relative error by norm: bfloat16 rounds the result, and weights where the machine multiplies bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
# (heads, rank, rope): less than a register, remainders everywhere, several panels, DeepSeek-V3's.
SHAPES = [(1, 5, 2), (6, 200, 8), (33, 40, 6), (16, 512, 64), (130, 129, 3)]
LONG = {"ranges": ([1, 1], [1300, 70]), "partly hidden": ([4], [1026]), "nothing new": ([0, 2, 0], [3, 2, 9])}


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name == "float32" else torch.bfloat16


def sources(stored: KeySource, rank: int) -> tuple[KeySource, KeySource]:
    """Latents as one head's keys, and their first columns as values."""
    keys = KeySource(OneHead(stored.records), stored.contexts)
    return keys, KeySource(Columns(keys.records, rank), keys.contexts)


def store(latents: Tensor, lengths: list[int], rank: int, name: str, paged: bool) -> tuple[Records, Records, Contexts]:
    """The rows as they are stored, and what they mean in float64. What no sequence owns is NaN."""
    plain = source(list(latents.split(lengths)), paged)
    assert isinstance(plain.records, Rows)
    rows = plain.records.values
    if name != "fp8":
        rounded = rows.to(dtype_of(name))
        return Rows(rounded), Rows(rounded.double()), plain.contexts
    width = latents.shape[1]
    records = LatentRecords(
        torch.full((len(rows), latent_bytes(rank, width - rank, "fp8")), 255, dtype=torch.uint8), rank, torch.bfloat16
    )
    owned = rows.isfinite().all(1).nonzero()[:, 0]
    records.write(owned, rows[owned])
    return records, LatentRecords(records.bytes_, rank, torch.float64), plain.contexts


def check(isa: str, counts: list[int], lengths: list[int], shape: tuple[int, int, int], name: str, topk: int | None):
    """One call beside the reference, on random numbers; topk: over a selection."""
    heads, rank, rope = shape
    queries = make_queries(counts, lengths)
    q = torch.randn(sum(counts), heads, rank + rope).to(dtype_of(name))
    exact = q.double()
    scale = 2 * (rank + rope) ** -0.5
    stored, meant, contexts = store(torch.randn(sum(lengths), rank + rope), lengths, rank, name, paged=True)
    keys, expected_keys = (sources(KeySource(records, contexts), rank) for records in (stored, meant))
    if topk is None:
        result = attention(q, *keys, queries, scale=scale, version=isa)
        expected = attention(exact, *expected_keys, queries, scale=scale, version="reference")
    else:
        selection = random_selection(counts, lengths, topk)
        result = sparse_attention(q, *keys, selection, queries, scale=scale, version=isa)
        expected = sparse_attention(exact, *expected_keys, selection, queries, scale=scale, version="reference")
    assert result.dtype == q.dtype and result.shape == (sum(counts), heads, rank)
    error = (result.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[q.dtype], error


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are not written are NaN."""
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype=None: torch.full(shape, torch.nan, dtype=dtype))


@each_isa
@pytest.mark.parametrize("topk", [None, 70])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["chunk", "decode"])
def test_shapes(isa: str, case: str, shape: tuple[int, int, int], name: str, topk: int | None) -> None:
    """Heads, words or keys that do not fill a register or a tile; scales of the wrong block; rows of another page."""
    check(isa, *CASES[case], shape, name, topk)


@each_isa
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [*LONG, "prefill"])
def test_cases(isa: str, case: str, name: str) -> None:
    """Ranges put together wrongly, one of them empty or hidden from some queries; sequences without queries."""
    check(isa, *(LONG | CASES)[case], (6, 48, 16), name, None)


@each_isa
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("topk", [63, 64, 65, 257, 600, 1290])
def test_long_selections(isa: str, topk: int, name: str) -> None:
    """Tiles and ranges of a selection that begin or end in the wrong place."""
    check(isa, [2, 1], [1300, 700], (6, 48, 16), name, topk)


@each_isa
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_call(isa: str, data: st.DataObject) -> None:
    """Whatever the cases above leave out."""
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    lengths = [count + data.draw(st.integers(0, 150)) for count in counts]
    name, heads, rope = data.draw(st.tuples(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(0, 20)))
    rank = data.draw(st.integers(1, 150))
    rank += -rank % 4 if name == "fp8" else 0  # torch, which writes the records, wants aligned scales
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    check(isa, counts, lengths, (heads, rank, rope), name, data.draw(st.sampled_from([None, 1, 90])))


@each_isa
@pytest.mark.parametrize("rises", [True, False])
def test_scores_far_apart(isa: str, rises: bool) -> None:
    """A maximum that is not brought up to date: weights that overflow, or keys that vanish beside later ones."""
    size = torch.linspace(0, 300, 400) if rises else torch.linspace(300, 0, 400)
    q, k = torch.ones(1, 3, 8), torch.randn(400, 8)
    k[:, 7] = size
    queries = make_queries([1], [400])
    result = attention(q, *sources(source([k], True), 7), queries, scale=1.0, version=isa)
    expected = attention(q.double(), *sources(source([k.double()], False), 7), queries, scale=1.0, version="reference")
    assert (result.double() - expected).norm() < 1e-4 * expected.norm()  # scores of 300 in float32


@each_isa
def test_threads_change_nothing(isa: str) -> None:
    """A cut, or an order of summing, that follows the number of threads."""
    keys, values = sources(source([torch.randn(1500, 72)], True), 64)
    q, queries = torch.randn(2, 16, 72), make_queries([2], [1500])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention(q, keys, values, queries, scale=0.1, version=isa))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_isa
def test_nothing_selected(isa: str) -> None:
    """A query without any entry that is left unwritten, or turned into NaN."""
    keys, values = sources(source([torch.randn(9, 12)], True), 10)
    selection = torch.tensor([[-1, -1], [3, -1]], dtype=torch.int32)
    q = torch.randn(2, 4, 12)
    result = sparse_attention(q, keys, values, selection, make_queries([2], [9]), scale=1.0, version=isa)
    assert (result[0] == 0).all()
    torch.testing.assert_close(result[1], values.context(0, 3, 4)[0].expand(4, 10))


@each_isa
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 9], "query 1 has position 9, but its sequence has 9 keys"),
        ([-2, -1], "query 1 has position -2, but its sequence has 9 keys"),
        ([-1, 4], "query 1 has position 4 after a -1"),
    ],
)
def test_bad_selections_are_refused(isa: str, row: list[int], message: str) -> None:
    """Reading rows that no sequence owns, or leaving out what stands behind a -1."""
    keys, values = sources(source([torch.randn(9, 12)], True), 10)
    selection = torch.tensor([[0, 8], row], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        sparse_attention(torch.randn(2, 4, 12), keys, values, selection, make_queries([2], [9]), scale=1.0, version=isa)


@each_isa
def test_bad_arguments_are_refused(isa: str) -> None:
    """Reading or writing past the end of a tensor."""
    records, queries = OneHead(Rows(torch.randn(128, 12))), make_queries([1], [100])

    def run(q: Tensor, contexts: Contexts, rank: int = 10) -> None:
        keys = KeySource(records, contexts)
        attention(q, keys, KeySource(Columns(records, rank), contexts), queries, scale=1.0, version=isa)

    paged = Contexts.paged(torch.tensor([[1, 0]]), [100])
    run(torch.randn(1, 4, 12), paged)
    with pytest.raises(ValueError, match="latent rows need 14 numbers, not 12"):
        run(torch.randn(1, 4, 14), paged)
    with pytest.raises(ValueError, match="queries are 12 wide and values 13"):
        run(torch.randn(1, 4, 12), paged, rank=13)
    with pytest.raises(ValueError, match="2 queries, but their sequences own"):
        run(torch.randn(2, 4, 12), paged)
    with pytest.raises(ValueError, match="names page 2 of a cache of 2"):
        run(torch.randn(1, 4, 12), Contexts.paged(torch.tensor([[2, 0]]), [100]))
    with pytest.raises(ValueError, match="keys past row 128"):
        run(torch.randn(1, 4, 12), Contexts((100,), (64,)))


@each_isa
def test_what_is_left_to_torch(isa: str) -> None:
    """Windows, masks, float64 and rows that need gradients being ignored by a kernel that knows none of them."""
    q, queries = torch.randn(1, 4, 12), make_queries([1], [9])
    stored = source([torch.randn(9, 12)], True)
    keys, values = sources(stored, 10)
    attention(q, keys, values, queries, scale=1.0, version=isa)
    selection = torch.zeros(1, 1, dtype=torch.int32)
    for option in ({"window": 4}, {"selection_TK": selection}):
        with pytest.raises(ValueError, match="cannot take these arguments"):
            attention(q, keys, values, queries, scale=1.0, version=isa, **option)
    assert not serves(q.double(), latent_rows(keys, values))
    assert not serves(q, latent_rows(keys, keys))
    assert isinstance(stored.records, Rows)
    learnt = KeySource(Rows(stored.records.values.clone().requires_grad_()), stored.contexts)
    assert not serves(q, latent_rows(*sources(learnt, 10)))
    wide = KeySource(Rows(torch.randn(12, 9).T), Contexts.packed([9]))
    assert not serves(q, latent_rows(*sources(wide, 10)))


def test_packed_queries_of_an_odd_stride() -> None:
    """Queries that are a view of something wider being read as if they lay side by side."""
    keys, values = sources(KeySource(Rows(torch.randn(9, 20)[:, 3:15]), Contexts.packed([9])), 10)
    q, queries = torch.randn(9, 4, 16)[:, :, 2:14], Queries((0, 9), (0,))
    result = attention(q, keys, values, queries, scale=0.3)
    expected = attention(q, keys, values, queries, scale=0.3, version="reference")
    torch.testing.assert_close(result, expected)
