"""Muon over matrices of which each process has a part."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
import torch.distributed as dist
from torch import Size, Tensor

from foveal.train.optim import direction
from foveal.train.parallel.collectives import all_to_all


def direct_together(
    pairs: Iterable[tuple[Tensor, Tensor]], shapes: Mapping[Tensor, Size], group: dist.ProcessGroup
) -> Iterator[tuple[Tensor, Tensor]]:
    """See `foveal.train.optim.directions`, for parts of which rank r of the group has the r-th.

    Stacks of matrices are cut between matrices, so that each rank has some whole. Single matrices are cut by rows: of
    as many as there are ranks each rank collects one, and sends the parts of its direction back.
    """
    single: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for parameter, moment in pairs:
        waiting = single[moment.dtype]
        if moment.dim() > 2:
            yield parameter, direction(moment)
        else:
            waiting.append((parameter, moment))
        if len(waiting) == group.size():
            yield from _one_each(waiting, shapes, group)
            waiting.clear()
    for waiting in single.values():
        if waiting:
            yield from _one_each(waiting, shapes, group)


def _one_each(
    pairs: list[tuple[Tensor, Tensor]], shapes: Mapping[Tensor, Size], group: dist.ProcessGroup
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rank r finds the direction of the r-th matrix."""
    rank, ranks = group.rank(), group.size()
    moments = [moment for _, moment in pairs]
    own = [moment.numel() for moment in moments] + [0] * (ranks - len(moments))
    of_mine = [0] * ranks
    if rank < len(pairs):
        rows, columns = shapes[pairs[rank][0]]
        of_mine = [count * columns for count in part_sizes(rows, ranks)]
    whole = all_to_all(torch.cat([moment.flatten() for moment in moments]), own, of_mine, group)
    if rank < len(pairs):
        whole = direction(whole.view(shapes[pairs[rank][0]])).flatten()
    parts = iter(all_to_all(whole, of_mine, own, group).split(own))
    for (parameter, moment), part in zip(pairs, islice(parts, len(pairs)), strict=True):
        yield parameter, part.view_as(moment)


def part_sizes(count: int, ranks: int) -> list[int]:
    """Rows of each rank's part of `count`, as FSDP cuts them: equal but for the last ones, which may be empty."""
    size = -(-count // ranks)
    return [max(0, min(size, count - r * size)) for r in range(ranks)]
