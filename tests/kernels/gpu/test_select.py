"""The Triton kernels of score and select, interpreted, against exact scores and a stable sort of them."""

from dataclasses import replace

import pytest
import torch
from packing import make_queries, source
from torch import Tensor

from foveal.kernels import Contexts, KeySource, Queries, Rows, select
from foveal.kernels.gpu.device import Card
from foveal.kernels.gpu.launch import AUTO, Choice, Tiles
from foveal.kernels.gpu.select import select_top
from foveal.kernels.records import IndexKeyRecords

PIECE = 64


def run(
    q: Tensor,
    weights: Tensor,
    keys: KeySource,
    queries: Queries,
    topk: int,
    rows: int = 1,
    choice: Choice = AUTO,
) -> Tensor:
    """Tiles of some queries and 16 keys; lists of few entries, so that they are cut often."""
    splits = choice.splits or 1
    choice = replace(choice, tiles=choice.tiles or Tiles(rows, 16, 4, 1), splits=splits)
    capacity = -(-(2 * topk + 16) // PIECE) * PIECE
    # Room for three queries' lists: more take another launch.
    launches, selection = select_top(
        q, weights, keys, queries, topk=topk, choice=choice, list_bytes=3 * 8 * splits * capacity, piece=PIECE
    )
    for launch in launches:
        launch.run()
    return selection


def whole(*shape: int) -> Tensor:
    """Small whole numbers: scores are exact, and many are equal."""
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize(("rows", "splits"), [(1, 2), (4, 1)])
@pytest.mark.parametrize("paged", [True, False])
def test_several_sequences(paged: bool, rows: int, splits: int) -> None:
    """Keys of another sequence, of the future or of unowned pages; tiles that end within a sequence; a batch in several
    launches; an empty sequence; ties."""
    torch.manual_seed(0)
    counts, lengths = [2, 0, 5], [70, 3, 9]
    q, weights, queries = whole(7, 3, 12), whole(7, 3), make_queries(counts, lengths)
    keys = source([whole(length, 12) for length in lengths], paged)
    result = run(q, weights, keys, queries, 7, rows, Choice(splits=splits))
    assert torch.equal(result, select(q, weights, keys, queries, topk=7, version="reference"))


@pytest.mark.parametrize("stored", ["fp8", "int8"])
def test_records(stored: str) -> None:
    """The wrong page, a scale of another key, signs or denormals lost; what is not owned is NaN."""
    torch.manual_seed(1)
    lengths = [70, 20]
    pages = torch.full((5, 64 * (16 + 4)), 0x7F, dtype=torch.uint8)
    records = IndexKeyRecords(pages, 16, stored)
    records.scales.fill_(torch.nan)
    table = torch.tensor([[3, 1], [4, 0]])
    eight = torch.int8 if stored == "int8" else torch.float8_e4m3fn
    for s, length in enumerate(lengths):
        position = torch.arange(length)
        page, place = table[s, position // 64], position % 64
        numbers = torch.randint(-3, 4, (length, 16)).float() * (1 if stored == "int8" else 2.0**-9)
        records.values[page, place] = numbers.to(eight).view(torch.uint8)
        records.scales[page, place] = 2.0 ** torch.randint(-2, 3, (length,))
    keys, queries = KeySource(records, Contexts.paged(table, lengths)), make_queries([1, 2], lengths)
    q, weights = torch.randint(-3, 4, (3, 2, 16)).float().to(eight), whole(3, 2)
    result = run(q, weights, keys, queries, 9, rows=2)
    assert torch.equal(result, select(q, weights, keys, queries, topk=9, version="reference"))


@pytest.mark.parametrize("card", [80, 100])
def test_ways_of_cards(card: int) -> None:
    """Keys that the compiler loads ahead, and scores in a branch: a block left out, or another's scores."""
    torch.manual_seed(2)
    lengths = [300, 40]
    q, weights, queries = whole(7, 3, 12), whole(7, 3), make_queries([5, 2], lengths)
    keys = source([whole(length, 12) for length in lengths], paged=True)
    result = run(q, weights, keys, queries, 7, choice=Choice(Tiles(4, 16, 4, 2), 1, Card(card, 2)))
    assert torch.equal(result, select(q, weights, keys, queries, topk=7, version="reference"))


_LENGTH = 300
SCORES = {
    "ascending": torch.arange(_LENGTH).float(),
    "descending": -torch.arange(_LENGTH).float(),
    "equal": torch.zeros(_LENGTH),
    "two zeros": torch.tensor([0.0, -0.0]).repeat(_LENGTH // 2),
    "few": torch.arange(_LENGTH).mul(7).remainder(5).float() - 2,
    "tiny": torch.arange(_LENGTH).mul(11).remainder(_LENGTH).sub(200).float() * 1e-40,
    "wide": torch.linspace(-80, 80, _LENGTH).exp2()[torch.arange(_LENGTH).mul(7).remainder(_LENGTH)],
}


@pytest.mark.parametrize(("topk", "splits"), [(1, 1), (33, 3), (100, 1)])
@pytest.mark.parametrize("kind", SCORES)
def test_streams_longer_than_a_list(kind: str, topk: int, splits: int) -> None:
    """A list that loses an entry, its order or the right one of equals when it is cut down or merged; digits of scores
    that are negative, equal or far apart."""
    scores = SCORES[kind]
    # ReLU of +-1 times a key: the weights give every score its sign back.
    keys = KeySource(Rows(torch.stack((scores.clamp_min(0), (-scores).clamp_min(0)), 1)), Contexts.packed([_LENGTH]))
    q, weights = torch.eye(2)[None], torch.tensor([[1.0, -1.0]])
    expected = scores.argsort(descending=True, stable=True)[:topk].sort().values.int()
    assert torch.equal(
        run(q, weights, keys, Queries((0, 1), (_LENGTH - 1,)), topk, choice=Choice(splits=splits))[0], expected
    )


def test_lists_do_not_grow_with_the_context() -> None:
    """A buffer of scores of the context's size: of a million tokens for many queries it would not fit."""
    keys = KeySource(Rows(torch.zeros(64, 4)), Contexts((1 << 20,), (-1,), torch.zeros(1, 1 << 14, dtype=torch.int64)))
    sizes = set()
    for context in (1 << 13, 1 << 20):
        keys = KeySource(keys.records, Contexts((context,), (-1,), keys.contexts.table_SB))
        q, queries = torch.zeros(64, 2, 4), Queries((0, 64), (context - 64,))
        launches, _ = select_top(q, torch.zeros(64, 2), keys, queries, topk=2048, choice=Choice(splits=1))
        sizes.add(sum(x.numel() for x in launches[0].arguments.values() if isinstance(x, Tensor) and x.dim() == 3))
    assert len(sizes) == 1


def test_bad_arguments_are_refused() -> None:
    """Sizes that do not match being read all the same."""
    keys = KeySource(Rows(torch.zeros(10, 4)), Contexts.packed([10]))
    with pytest.raises(ValueError, match="queries have 3 numbers, keys 4"):
        run(torch.zeros(1, 2, 3), torch.zeros(1, 2), keys, Queries((0, 1), (9,)), 2)
    with pytest.raises(ValueError, match="weights have shape"):
        run(torch.zeros(1, 2, 4), torch.zeros(1, 1), keys, Queries((0, 1), (9,)), 2)
    with pytest.raises(ValueError, match="10 keys, but a query at 10"):
        run(torch.zeros(1, 2, 4), torch.zeros(1, 2), keys, Queries((0, 1), (10,)), 2)
