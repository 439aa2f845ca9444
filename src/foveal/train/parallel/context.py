"""Context parallelism: the tokens of one row spread over processes, which share keys and keep queries to themselves.

What travels is what a cache would hold: latents and index keys (576 + 128 numbers a token in DeepSeek-V3.2) or keys and
values by group. Queries, scores and feed-forwards stay where their tokens are.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from foveal.kernels.transfer import send
from foveal.nn.batch import Batch, Gathered
from foveal.train.parallel.collectives import gather_rows


def share_context(batch: Batch, group: dist.ProcessGroup) -> tuple[Batch, Tensor]:
    """The tokens of a batch of whole packed sequences that this rank of the group computes, as a batch, and their rows,
    int64, in the batch that was given."""
    assert batch.table_SB is None and batch.gathered is None
    total, rank, ranks = len(batch.ids_T), group.rank(), group.size()
    spans = [_spans(total, r, ranks) for r in range(ranks)]
    counts = [sum(stop - start for start, stop in own) for own in spans]
    most = max(counts)
    rows = [_rows(own) for own in spans]
    place_N = torch.empty(total, dtype=torch.int64)
    for r, rows_t in enumerate(rows):
        place_N[rows_t] = r * most + torch.arange(len(rows_t))
    device = batch.ids_T.device
    mine_T, place_N = send(rows[rank], device), send(place_N, device)
    pieces = [piece for start, stop in spans[rank] for piece in _pieces(start, stop, batch.q_offsets)]
    own = replace(
        batch,
        ids_T=batch.ids_T[mine_T],
        positions_T=batch.positions_T[mine_T],
        q_offsets=tuple(accumulate((stop - start for start, stop, _, _ in pieces), initial=0)),
        k_lengths=tuple(stop - first for _, stop, first, _ in pieces),
        rope_lengths=tuple(last - first for _, _, first, last in pieces),
        gathered=Gathered(
            lambda values_TX: gather_rows(values_TX, place_N, most, group), tuple(first for _, _, first, _ in pieces)
        ),
    )
    return own, mine_T


def _spans(total: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Of 2 x ranks pieces of the line of all tokens, the rank-th from the front and the rank-th from the end.

    A token's work grows with its position. In rows of equal length what a piece has more of it the mirrored one has
    less, so that all ranks have the same; with documents of many lengths it is so on average.
    """
    cuts = [total * i // (2 * ranks) for i in range(2 * ranks + 1)]
    front, back = (cuts[rank], cuts[rank + 1]), (cuts[-2 - rank], cuts[-1 - rank])
    return [(front[0], back[1])] if front[1] == back[0] else [front, back]


def _rows(spans: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in spans])


def _pieces(start: int, stop: int, offsets: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """(from, to, first row, end) of each sequence that has tokens in [start, stop): from and to are rows of these."""
    parts = ((max(first, start), min(last, stop), first, last) for first, last in pairwise(offsets))
    return [part for part in parts if part[0] < part[1]]
