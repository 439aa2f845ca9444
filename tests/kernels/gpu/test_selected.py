"""The Triton kernel of grouped-query attention over a selection, interpreted, against the reference in float64."""

import pytest
import torch
from packing import close, keys_and_values, make_queries, random_selection
from torch import Tensor

from foveal.kernels import Contexts, KeySource, Queries, Rows, sparse_attention
from foveal.kernels.gpu.flash import selected_attention
from foveal.kernels.gpu.launch import Choice, Tiles

SMALL = Choice(Tiles(16, 16, 4, 1), 1)
# Counts of queries and lengths of contexts: several sequences, one of them without queries, contexts of several pages.
MIXED = ([2, 0, 3], [70, 5, 7])


def expected(q: Tensor, keys: KeySource, values: KeySource, selection: Tensor, queries: Queries) -> Tensor:
    """The reference."""
    exact = (KeySource(Rows(x.records.read(slice(None)).double()), x.contexts) for x in (keys, values))
    return sparse_attention(q.double(), *exact, selection, queries, scale=0.3, version="reference")


def check(
    q: Tensor, keys: KeySource, values: KeySource, selection: Tensor, queries: Queries, choice: Choice = SMALL
) -> None:
    """One call beside the reference."""
    work = selected_attention(q, keys, values, selection, queries, scale=0.3, choice=choice).run()
    close(work.out_THV, expected(q, keys, values, selection, queries))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize(
    ("heads", "groups", "widths"), [(6, 2, (12, 5)), (3, 3, (24, 24)), (18, 1, (40, 33)), (5, 1, (3, 70))], ids=str
)
def test_selection(heads: int, groups: int, widths: tuple[int, int], paged: bool, splits: int) -> None:
    """Padding of heads or numbers that leaks in, another group's or sequence's rows, -1 that is read, ranges put
    together wrongly; tiles that a group does not fill, or fills more than once."""
    keys, values = keys_and_values(MIXED[1], groups, widths, paged)
    queries, selection = make_queries(*MIXED), random_selection(*MIXED, 37)
    check(torch.randn(5, heads, widths[0]), keys, values, selection, queries, Choice(SMALL.tiles, splits))


def test_tiles_of_its_own_choice() -> None:
    """A plan that is only right for tiles that a test has chosen."""
    keys, values = keys_and_values([300], 2, (20, 20), True)
    check(torch.randn(1, 4, 20), keys, values, random_selection([1], [300], 299), make_queries([1], [300]), Choice())


def test_many_entries() -> None:
    """Entries after the first thousands that are not counted."""
    keys, values = keys_and_values([3000], 1, (4, 4), True)
    selection = torch.nn.functional.pad(torch.arange(500, 3000, dtype=torch.int32), (0, 100), value=-1)[None]
    tiles = Choice(Tiles(16, 64, 4, 1), 2)
    check(torch.randn(1, 2, 4), keys, values, selection, make_queries([1], [3000]), tiles)


def test_strides() -> None:
    """Queries that are a part of more numbers, as a projection leaves them; a selection that is a part of another."""
    keys, values = keys_and_values([40], 2, (8, 8), True)
    selection = torch.full((3, 90), 3, dtype=torch.int32)
    selection[:, :50] = random_selection([3], [40], 50)
    q = torch.randn(3, 7, 10)
    check(q[:, 1:5, 2:], keys, values, selection[:, :50], make_queries([3], [40]))
    check(q.mT[:, 2:6], *keys_and_values([40], 2, (7, 8), False), selection[:, :50], make_queries([3], [40]))


@pytest.mark.parametrize("splits", [1, 2])
def test_nothing_selected(splits: int) -> None:
    """A query without any entry that becomes NaN or keeps what was in memory; a log-sum-exp to the wrong base."""
    keys, values = keys_and_values([9], 2, (6, 5), True)
    q, queries = torch.randn(2, 4, 6), make_queries([2], [9])
    selection = torch.tensor([[-1] * 20, [0, 3, 5, *[-1] * 17]], dtype=torch.int32)
    choice = Choice(SMALL.tiles, splits)
    work = selected_attention(q, keys, values, selection, queries, scale=0.3, choice=choice).run()
    assert (work.out_THV[0] == 0).all() and work.lse_TH[0].isneginf().all()
    k_HKP = keys.select(0, selection[1, :3]).transpose(0, 1).repeat_interleave(2, 0)
    torch.testing.assert_close(work.lse_TH[1], (k_HKP @ q[1, :, :, None] * 0.3).logsumexp((1, 2)))


def test_positions_that_are_none_are_left_out() -> None:
    """Reading past the end of a sequence: into another's pages, or beyond memory."""
    keys, values = keys_and_values([9, 70], 2, (6, 5), True)
    q, queries = torch.randn(2, 4, 6), make_queries([1, 1], [9, 70])
    wrong = torch.tensor([[2, 1 << 30, 5, 9, -7], [69, 70, -1, 127, 64]], dtype=torch.int32)
    right = torch.tensor([[2, 5, -1], [69, 64, -1]], dtype=torch.int32)
    work = selected_attention(q, keys, values, wrong, queries, scale=0.3, choice=SMALL).run()
    close(work.out_THV, expected(q, keys, values, right, queries))


def test_bad_arguments_are_refused() -> None:
    """Shapes that do not belong together being read all the same."""
    keys, values = keys_and_values([9], 2, (6, 5), True)
    selection = torch.zeros(1, 2, dtype=torch.int32)

    def attend(q: Tensor, contexts: Contexts = keys.contexts) -> None:
        own = (KeySource(x.records, contexts) for x in (keys, values))
        selected_attention(q, *own, selection, Queries((0, 1), (8,)), scale=1.0)

    with pytest.raises(ValueError, match="do not match"):
        attend(torch.randn(1, 3, 6))
    with pytest.raises(ValueError, match="do not match"):
        attend(torch.randn(1, 4, 7))
    with pytest.raises(ValueError, match="too small for contexts"):
        attend(torch.randn(1, 4, 6), Contexts((100,), (-1,), keys.contexts.table_SB))
