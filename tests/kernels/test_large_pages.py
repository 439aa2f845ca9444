"""Weights that are moved into large pages."""

import mmap
from pathlib import Path

import pytest
import torch

from foveal.kernels import settle

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no such pages")


def test_values_stay_and_lie_together() -> None:
    """Values that change on the way; tensors that begin inside a line of the cache; parameters that are replaced."""
    parameter = torch.nn.Parameter(torch.randn(7, 33))
    tensors = [parameter, torch.randint(-128, 127, (5, 3), dtype=torch.int8), torch.randn(9).bfloat16()]
    copies = [x.detach().clone() for x in tensors]
    settle(tensors)
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
    first = tensors[0].data_ptr()
    assert [x.data_ptr() - first for x in tensors] == [0, 960, 1024]
    assert parameter.requires_grad and isinstance(parameter, torch.nn.Parameter)


def test_what_shares_data_still_does() -> None:
    """A tied head that becomes a copy: twice the memory, and an update of one that the other does not see."""
    embedding = torch.randn(8, 4)
    head = embedding.view(8, 4)
    settle([embedding, head])
    assert embedding.data_ptr() == head.data_ptr()


def test_others_are_left_alone() -> None:
    """Errors for what cannot be moved: other layouts, slices, nothing at all."""
    sparse, part, none = torch.eye(3).to_sparse(), torch.randn(4, 6)[:, :3], torch.empty(0)
    place = part.data_ptr()
    settle([sparse, part, none])
    settle([])
    assert part.data_ptr() == place and sparse.layout == torch.sparse_coo


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs /proc")
def test_the_region_asks_for_large_pages() -> None:
    """A region without the advice, which works as well and is slower."""
    x = torch.randn(1 << 20)
    settle([x])
    with open("/proc/self/smaps", encoding="ascii") as maps:
        inside = False
        for line in maps:
            bounds = line.split()[0].split("-")
            if len(bounds) == 2:
                inside = int(bounds[0], 16) <= x.data_ptr() < int(bounds[1], 16)
            elif inside and line.startswith("VmFlags"):
                assert "hg" in line.split()
                return
    raise AssertionError("the region is not in the map")
