"""The Triton kernel of grouped-query attention, interpreted, against the references."""

import pytest
import torch
from packing import close, keys_and_values, make_queries
from torch import Tensor

from foveal.kernels import Queries, attention, flash_forward
from foveal.kernels.gpu.flash import Seen, packed_attention, plain_attention
from foveal.kernels.gpu.launch import Choice, Tiles

SMALL = Tiles(16, 16, 4, 1)


def check(counts: list[int], lengths: list[int], heads: int, groups: int, seen: Seen, *, paged: bool, splits: int):
    """One call beside the reference."""
    torch.manual_seed(0)
    keys, values = keys_and_values(lengths, groups, (12, 5), paged)
    queries, q = make_queries(counts, lengths), torch.randn(sum(counts), heads, 12)
    work = packed_attention(q, keys, values, queries, scale=0.4, seen=seen, choice=Choice(SMALL, splits)).run()
    options = {"scale": 0.4, "window": seen.window, "sinks": seen.sinks}
    close(work.out_THV, attention(q, keys, values, queries, **options, version="reference"))


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (20, 0), (17, 3), (30, 40), (200, 1)])
def test_windows_and_sinks(window: int | None, sinks: int) -> None:
    """A block that is skipped though some row sees it, or counted as sink and as window; sinks inside the window."""
    check([5], [80], 4, 2, Seen(True, window, sinks), paged=True, splits=1)


@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("paged", [True, False])
def test_decode_in_ranges(paged: bool, window: int | None) -> None:
    """Ranges of which some are empty; another sequence's length or table."""
    check([1, 1, 1], [3, 90, 64], 6, 3, Seen(True, window, 2 if window else 0), paged=paged, splits=3)


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (10, 1), (9, 3)])
def test_tiles_across_queries(heads: int, groups: int) -> None:
    """Heads of a group that do not divide a tile; an empty sequence between others."""
    check([4, 0, 9], [10, 7, 9], heads, groups, Seen(True, None, 0), paged=False, splits=1)


@pytest.mark.parametrize(("queries", "keys"), [(5, 37), (20, 9), (3, 3)])
@pytest.mark.parametrize("seen", [Seen(False, None, 0), Seen(True, None, 0), Seen(True, 4, 2)])
def test_plain_tensors(seen: Seen, queries: int, keys: int) -> None:
    """Alignment to the bottom right; queries that see nothing (zeros and -inf); strides of a view."""
    torch.manual_seed(1)
    q = torch.randn(2, 6, queries, 8).transpose(1, 2)
    k, v = torch.randn(2, keys, 3, 8), torch.randn(2, keys, 3, 20)[..., 4:16]
    work = plain_attention(q, k, v, scale=0.3, seen=seen, choice=Choice(SMALL)).run()
    options = {"causal": seen.causal, "scale": 0.3, "window": seen.window, "sinks": seen.sinks}
    out, lse = flash_forward(q, k, v, **options, version="reference")
    torch.testing.assert_close(work.out_THV.view(out.shape), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(work.lse_TH.view(lse.shape), lse, atol=1e-5, rtol=1e-5)


def test_bad_arguments_are_refused() -> None:
    """Heads or widths that do not fit being read all the same."""
    keys, values = keys_and_values([9], 2, (6, 5), True)

    def run(q: Tensor) -> None:
        packed_attention(q, keys, values, Queries((0, 1), (8,)), scale=1.0, seen=Seen(True, None, 0))

    with pytest.raises(ValueError, match="do not match"):
        run(torch.randn(1, 3, 6))
    with pytest.raises(ValueError, match="do not match"):
        run(torch.randn(1, 4, 7))
