"""Weights in large pages of memory.

A decode step reads every weight once, in order: with pages of 4 KiB the processor waits for page tables as well, and
its prefetcher stops at the end of each. Linux gives pages of 2 MiB to regions that ask for them (madvise).
"""

import mmap
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a line of the cache


def settle(tensors: Iterable[Tensor]) -> None:
    """Move the data of dense CPU tensors, one after the other, into one region that asks for large pages.

    The tensors stay the objects that they are; of those that share their data, all move with the first. Others, and all
    where the system has no such pages, are left alone. For inference: whoever holds an address must ask for it again.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    movable = [x for x in tensors if x.device.type == "cpu" and x.layout == torch.strided and x.is_contiguous()]
    room = sum(_rounded(size) for _, size in {_place(x) for x in movable})
    if not room:
        return
    region = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        region.madvise(mmap.MADV_HUGEPAGE)
    free_X = torch.frombuffer(region, dtype=torch.uint8)
    moved: dict[tuple[int, int], Tensor] = {}
    for x in movable:
        place = _place(x)
        if place not in moved:
            moved[place], free_X = free_X[: x.nbytes], free_X[_rounded(x.nbytes) :]
            moved[place].copy_(x.detach().view(-1).view(torch.uint8))
        x.data = moved[place].view(x.dtype).view(x.shape)


def _place(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.nbytes


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
