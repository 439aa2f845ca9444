"""The Triton kernel of absorbed latent attention, interpreted, against the references."""

import pytest
import torch
from packing import close, make_queries, random_selection, source
from torch import Tensor

from foveal.config.formats import latent_bytes
from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows, attention, sparse_attention
from foveal.kernels.gpu.device import Card
from foveal.kernels.gpu.latent import latent_attention
from foveal.kernels.gpu.launch import Choice, Tiles
from foveal.kernels.records import LatentRecords

SMALL = Tiles(16, 16, 4, 1)
# Counts of queries and lengths of contexts: several sequences, one of them without queries, contexts of several pages.
MIXED = ([2, 0, 3], [70, 5, 7])


def latents(counts: list[int], lengths: list[int], rank: int, rope: int, *, paged: bool, fp8: bool = False):
    """Keys and values of random latents; what no sequence owns is NaN (or e4m3's code for it)."""
    plain = source([torch.randn(length, rank + rope) for length in lengths], paged)
    assert isinstance(plain.records, Rows)
    records = plain.records
    if fp8:
        stored = torch.full((len(records.values), latent_bytes(rank, rope, "fp8")), 0x7F, dtype=torch.uint8)
        owned = (~records.values.isnan().any(1)).nonzero()[:, 0]
        decoded = LatentRecords(stored, rank, torch.float32)
        decoded.write(owned, records.values[owned])
        keys = KeySource(OneHead(decoded), plain.contexts)
    else:
        keys = KeySource(OneHead(records), plain.contexts)
    return keys, KeySource(Columns(keys.records, rank), plain.contexts), make_queries(counts, lengths)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize(("heads", "rank", "rope", "fp8"), [(3, 24, 6, False), (17, 20, 0, False), (5, 160, 10, True)])
def test_selection(heads: int, rank: int, rope: int, fp8: bool, paged: bool, splits: int) -> None:
    """Padding of heads or numbers that leaks in; -1 that is read; another sequence's rows; a scale of the wrong block;
    ranges put together wrongly."""
    torch.manual_seed(0)
    keys, values, queries = latents(*MIXED, rank, rope, paged=paged, fp8=fp8)
    q, selection = torch.randn(5, heads, rank + rope), random_selection(*MIXED, 21)
    work = latent_attention(q, keys, values, selection, queries, scale=0.3, choice=Choice(SMALL, splits)).run()
    close(work.out_THV, sparse_attention(q, keys, values, selection, queries, scale=0.3, version="reference"))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("fp8", [True, False])
def test_every_key(fp8: bool, splits: int) -> None:
    """A query that sees the future or the next sequence; a tile of rows across queries; an empty sequence."""
    torch.manual_seed(1)
    keys, values, queries = latents(*MIXED, 24, 8, paged=True, fp8=fp8)
    q = torch.randn(5, 7, 32)
    work = latent_attention(q, keys, values, None, queries, scale=0.3, choice=Choice(SMALL, splits)).run()
    close(work.out_THV, attention(q, keys, values, queries, scale=0.3, version="reference"))


@pytest.mark.parametrize("card", [80, 90])
@pytest.mark.parametrize("selected", [True, False])
def test_ways_of_cards(selected: bool, card: int) -> None:
    """Blocks of keys that the compiler loads ahead, and scores in a branch, as cards with room get them: a block left
    out, or another's mask."""
    torch.manual_seed(2)
    keys, values, queries = latents(*MIXED, 24, 8, paged=True)
    q, selection = torch.randn(5, 7, 32), random_selection(*MIXED, 21) if selected else None
    choice = Choice(Tiles(64, 16, 4, 2), 1, Card(card, 2))
    work = latent_attention(q, keys, values, selection, queries, scale=0.3, choice=choice).run()
    if selection is None:
        close(work.out_THV, attention(q, keys, values, queries, scale=0.3, version="reference"))
    else:
        close(work.out_THV, sparse_attention(q, keys, values, selection, queries, scale=0.3, version="reference"))


def test_log_sum_exp() -> None:
    """Training reads it: the wrong base, or a factor that is left out."""
    keys, values, queries = latents([1], [40], 16, 4, paged=False)
    q = torch.randn(1, 2, 20)
    expected = (q[0] @ keys.context(0, 0, 40)[:, 0].T * 0.5).logsumexp(-1)
    for splits in (1, 2):
        work = latent_attention(q, keys, values, None, queries, scale=0.5, choice=Choice(SMALL, splits)).run()
        torch.testing.assert_close(work.lse_TH[0], expected)


def test_nothing_selected() -> None:
    """A query without any entry that becomes NaN, or keeps what was in memory."""
    keys, values, queries = latents([2], [9], 16, 4, paged=True)
    selection = torch.tensor([[-1, -1], [3, -1]], dtype=torch.int32)
    for splits in (1, 2):
        work = latent_attention(
            torch.randn(2, 3, 20), keys, values, selection, queries, scale=1.0, choice=Choice(SMALL, splits)
        ).run()
        assert (work.out_THV[0] == 0).all() and work.lse_TH[0].isneginf().all()
        torch.testing.assert_close(work.out_THV[1], values.context(0, 3, 4).expand(3, 1, 16)[:, 0])


def test_positions_that_are_none_are_left_out() -> None:
    """Reading past the end of a sequence: into another's pages, or beyond memory."""
    keys, values, queries = latents([1], [9], 16, 4, paged=True)
    q, wrong = torch.randn(1, 3, 20), torch.tensor([[2, 5, 9, 1 << 30]], dtype=torch.int32)
    work = latent_attention(q, keys, values, wrong, queries, scale=1.0, choice=Choice(SMALL, 1)).run()
    close(work.out_THV, sparse_attention(q, keys, values, wrong[:, :2], queries, scale=1.0, version="reference"))


def test_bad_arguments_are_refused() -> None:
    """Shapes that do not belong together being read all the same."""
    keys, values, queries = latents([1], [9], 16, 4, paged=True)
    table = keys.contexts.table_SB
    assert table is not None

    def run(q: Tensor, contexts: Contexts, queries: Queries) -> None:
        latent_attention(
            q, KeySource(keys.records, contexts), KeySource(values.records, contexts), None, queries, scale=1.0
        )

    # The same object on both sides: `latents_of` wants one table.
    with pytest.raises(ValueError, match="latent rows need 21 numbers, not 20"):
        run(torch.randn(1, 2, 21), keys.contexts, queries)
    with pytest.raises(ValueError, match="q has 2 rows"):
        run(torch.randn(2, 2, 20), keys.contexts, queries)
    with pytest.raises(ValueError, match="sequence 0 has 9 keys, but a query at 9"):
        run(torch.randn(1, 2, 20), keys.contexts, Queries((0, 1), (9,)))
    with pytest.raises(ValueError, match="too small for contexts"):
        run(torch.randn(1, 2, 20), Contexts((100,), (-1,), table), Queries((0, 1), (99,)))
    with pytest.raises(ValueError, match="not int64"):
        run(torch.randn(1, 2, 20), Contexts((9,), (-1,), table.int()), queries)
