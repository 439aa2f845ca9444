"""The compiled attention against the reference in float64: both of its forms (one query, tiles of queries)."""

import pytest
import torch
from compiled import each_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import CASES, close, make_queries, random_selection, source
from torch import Tensor

from foveal.kernels import Contexts, KeySource, Queries, Rows, attention
from foveal.kernels.cpu.library import instruction_sets

HEADS = {"grouped": (6, 2, 16, 16), "odd": (3, 3, 9, 5), "one key head": (5, 1, 24, 40), "wide": (9, 3, 64, 48)}


def sources(k: Tensor, v: Tensor, lengths: list[int], paged: bool) -> tuple[KeySource, KeySource]:
    """Keys and values at the same places, as parts of one buffer (so with gaps between rows and heads)."""
    wide = torch.cat((k, v), 2)
    both = source(list(wide.split(lengths)), paged)
    assert isinstance(both.records, Rows)
    parts = both.records.values.split([k.shape[2], v.shape[2]], 2)
    return KeySource(Rows(parts[0]), both.contexts), KeySource(Rows(parts[1]), both.contexts)


def random_case(
    heads: tuple[int, int, int, int], counts: list[int], lengths: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    q_heads, groups, key_dim, value_dim = heads
    shapes = ((sum(counts), q_heads, key_dim), (sum(lengths), groups, key_dim), (sum(lengths), groups, value_dim))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v


def compare(
    isa: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    lengths: list[int],
    paged: bool,
    queries: Queries,
    slack: float = 0.0,
    **options: object,
) -> None:
    q, k, v = tensors
    arguments = {"scale": 0.3, **options}
    expected = attention(
        q.double(), *sources(k.double(), v.double(), lengths, False), queries, **arguments, version="reference"
    )
    result = attention(q, *sources(k, v, lengths, paged), queries, **arguments, version=isa)
    assert result.dtype == q.dtype and not result.isnan().any()
    close(result, expected, slack)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (17, 0), (17, 3), (25, 3), (40, 30), (1, 0)])
def test_attention(isa: str, case: str, heads: str, window: int | None, sinks: int, dtype: torch.dtype) -> None:
    """A wrong edge (causal, window, sinks), a wrong page or head, lanes past an odd size, unowned NaN in a sum."""
    counts, lengths = CASES[case]
    tensors = random_case(HEADS[heads], counts, lengths, dtype)
    queries = make_queries(counts, lengths)
    for paged in (False, True):
        compare(isa, tensors, lengths, paged, queries, window=window, sinks=sinks)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (20, 0), (20, 3)])
def test_masked_attention(isa: str, case: str, window: int | None, sinks: int, dtype: torch.dtype) -> None:
    """The masked form: a key that was not selected, a cursor that loses or repeats a position between tiles."""
    counts, lengths = CASES[case]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 40)
    # Something is seen: the query's own position.
    own = torch.cat([torch.arange(n - t, n) for t, n in zip(counts, lengths, strict=True)])[:, None].int()
    selection = torch.where((selection == own).any(1, keepdim=True), selection, torch.cat((own, selection[:, 1:]), 1))
    selection = torch.where(selection < 0, torch.iinfo(torch.int32).max, selection).sort(1).values
    selection = torch.where(selection == torch.iinfo(torch.int32).max, -1, selection)
    for heads in HEADS.values():
        tensors = random_case(heads, counts, lengths, dtype)
        for paged in (False, True):
            compare(isa, tensors, lengths, paged, queries, window=window, sinks=sinks, selection_TK=selection)


@each_isa
def test_long_contexts(isa: str) -> None:
    """Several tiles of keys and of queries, and one query whose keys are cut into parts, in one call."""
    counts, lengths = [1, 150, 1], [700, 400, 1]
    tensors = random_case((4, 2, 16, 8), counts, lengths, torch.float32)
    queries = make_queries(counts, lengths)
    for window, sinks in ((None, 0), (300, 0), (300, 70)):
        compare(isa, tensors, lengths, True, queries, window=window, sinks=sinks)
    compare(isa, tensors, lengths, True, queries, selection_TK=random_selection(counts, lengths, 200))


@each_isa
def test_threads_change_nothing(isa: str) -> None:
    """Pieces that depend on the number of threads, or two threads that write to one place."""
    counts, lengths = [1, 200, 90], [1500, 200, 300]
    q, k, v = random_case((6, 2, 32, 32), counts, lengths, torch.float32)
    queries, keys = make_queries(counts, lengths), sources(k, v, lengths, True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attention(q, *keys, queries, scale=0.2, version=isa))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_isa
@pytest.mark.parametrize("count", [1, 40])
def test_large_scores(isa: str, count: int) -> None:
    """A softmax that overflows, or that loses its maximum from one tile to the next."""
    q, k, v = random_case((2, 1, 16, 16), [count], [300], torch.float32)
    k[150] *= 300
    k[280] *= 500
    q *= 30
    # What float32 rounds off the scores themselves, where the largest two of a query are close.
    largest = 0.3 * torch.einsum("thp,ngp->thn", q, k).abs().max().item()
    compare(isa, (q, k, v), [300], False, make_queries([count], [300]), slack=largest * 2**-23)


@each_isa
def test_nothing_selected_gives_zeros(isa: str) -> None:
    """NaN from a softmax over nothing."""
    q, k, v = random_case((2, 1, 16, 16), [3], [200], torch.float32)
    selection = torch.tensor([[5, 180], [-1, -1], [0, -1]], dtype=torch.int32)
    out = attention(
        q, *sources(k, v, [200], False), make_queries([3], [200]), scale=0.3, selection_TK=selection, version=isa
    )
    assert out[1].eq(0).all() and not out.isnan().any() and out[2].ne(0).all()


@each_isa
def test_nan_stays_nan(isa: str) -> None:
    """A broken key or query that goes unnoticed."""
    for count in (1, 20):
        q, k, v = random_case((2, 1, 16, 16), [count], [50], torch.float32)
        k[10, 0, 3] = torch.nan
        assert (
            attention(q, *sources(k, v, [50], False), make_queries([count], [50]), scale=1.0, version=isa).isnan().all()
        )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shapes(data: st.DataObject) -> None:
    """Combinations of sizes that nobody thought of."""
    draw = data.draw
    size = st.integers(1, 40)
    groups, group, key_dim, value_dim = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(size), draw(size)
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=3))
    counts = [draw(st.integers(1, length)) for length in lengths]
    window = draw(st.none() | st.integers(1, 220))
    sinks, dtype = draw(st.integers(0, 220)), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 9)))
    tensors = random_case((groups * group, groups, key_dim, value_dim), counts, lengths, dtype)
    for kernels in instruction_sets():
        queries = make_queries(counts, lengths)
        compare(kernels.isa, tensors, lengths, draw(st.booleans()), queries, window=window, sinks=sinks)


@each_isa
def test_bad_arguments_are_refused(isa: str) -> None:
    """Reading or writing past a tensor, whatever the arguments say."""
    q, k, v = random_case((4, 2, 8, 8), [2], [90], torch.float32)
    queries, keys, values = make_queries([2], [90]), *sources(k, v, [90], True)

    def run(q: Tensor = q, keys: KeySource = keys, values: KeySource = values, **options: object) -> None:
        attention(q, keys, values, options.pop("queries", queries), scale=1.0, version=isa, **options)

    with pytest.raises(ValueError, match="heads or dimensions"):
        run(q[:, :3].contiguous())
    with pytest.raises(ValueError, match="heads or dimensions"):
        run(q[..., :7])
    with pytest.raises(ValueError, match="4 queries, but their sequences own"):
        run(torch.cat((q, q)))
    with pytest.raises(ValueError, match="sinks must not be negative, not -1"):
        run(sinks=-1)
    with pytest.raises(ValueError, match="queries up to position 91"):
        run(queries=Queries((0, 2), (89,)))
    with pytest.raises(ValueError, match="queries of 2 sequences, but contexts of 1"):
        run(queries=Queries((0, 1, 2), (3, 4)))
    assert keys.contexts.table_SB is not None
    table_SB = keys.contexts.table_SB.clone()
    table_SB[0, 1] = 99
    broken = Contexts((90,), (-1,), table_SB)
    with pytest.raises(ValueError, match="names page 99"):
        run(keys=KeySource(keys.records, broken), values=KeySource(values.records, broken))
    for entries in ([[0, 90], [0, 1]], [[0, 1], [1, 0]], [[0, 0], [1, -1]], [[-1, 0], [1, -1]], [[-2, 0], [1, -1]]):
        with pytest.raises(ValueError, match="selection of query"):
            run(selection_TK=torch.tensor(entries, dtype=torch.int32))
    with pytest.raises(ValueError, match="cannot take these arguments"):
        run(selection_TK=torch.tensor([[0], [0]]))
    with pytest.raises(ValueError, match="cannot take these arguments"):
        run(q.double())
