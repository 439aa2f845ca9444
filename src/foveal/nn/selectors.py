"""What an indexer is compared with: modules that take its place in a block and select without having learned to."""

from copy import copy

import torch
from torch import Tensor, nn

from foveal.cache.layouts import BlockCache
from foveal.kernels.dense import widened
from foveal.kernels.divergence import attention_shares, context_tiles, future
from foveal.kernels.selection import first_of_the_highest
from foveal.nn.mixer import Mixer
from foveal.nn.step import Step
from foveal.nn.watch import Gaze, Sight

SINKS = 4
"""First tokens that the recency selection keeps (StreamingLLM, arXiv 2309.17453)."""


class Selector(nn.Module):
    """Base: decides when there is something to select, as `Indexer.forward` does."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        if topk < 1:
            raise ValueError(f"a selection has at least 1 token, not {topk}")
        self.topk = topk

    @torch.no_grad()
    def forward(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor | None:
        """The selection, int32 [T, topk]; None while no sequence of the batch is longer than topk."""
        if step.batch.dense or max(step.contexts.lengths) <= self.topk:
            return None
        return self.select(x_TD, latent_TX, step, cache)

    def select(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        """int32 [T, topk], ascending, -1 last: everything where a query sees no more than topk."""
        raise NotImplementedError


class Recency(Selector):
    """The first four tokens and the most recent ones."""

    def select(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        """See `Selector.select`."""
        return recent(step.batch.positions_T, self.topk)


class Random(Selector):
    """Tokens drawn evenly from all that a query sees; the same ones however the sequence is cut into chunks."""

    def __init__(self, topk: int, seed: int) -> None:
        super().__init__(topk)
        self.seed = seed

    def select(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        """See `Selector.select`."""
        return random(step.batch.positions_T, self.topk, self.seed)


class Oracle(Selector):
    """The tokens that dense attention, averaged over heads, looks at most: what a perfect indexer would choose.

    Costs dense attention, and more: it runs the mixer once to know its queries and keys.
    """

    def __init__(self, topk: int, mixer: Mixer) -> None:
        super().__init__(topk)
        self._mixer = [mixer]  # in a list, so that its parameters do not become this module's as well

    def select(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        """See `Selector.select`."""
        gaze = self._gaze(x_TD, latent_TX, step, cache)
        selection_TK = torch.empty(len(x_TD), self.topk, dtype=torch.int32, device=x_TD.device)
        read, k_NGP = -1, x_TD
        for s, rows, first in context_tiles(step.queries, gaze.q_THP.shape[1]):
            if s != read:
                read, k_NGP = s, widened(gaze.keys.context(s, 0, gaze.keys.contexts.lengths[s]))
            count = rows.stop - rows.start
            shares_tN = gaze_shares(gaze, k_NGP, rows, first)
            hidden_tN = future(first, count, first + count, x_TD.device)
            selection_TK[rows] = first_of_the_highest(shares_tN.masked_fill_(hidden_tN, float("-inf")), self.topk)
        return selection_TK

    def _gaze(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Gaze:
        looking = copy(step)
        looking.watch = _nobody
        self._mixer[0](x_TD, latent_TX, looking, cache, None)
        assert looking.gaze
        return looking.gaze


def gaze_shares(gaze: Gaze, k_NGP: Tensor, rows: slice, first: int) -> Tensor:
    """Where the queries of some packed rows look, the first of them at position `first`: [t, n], n up to the last.

    k_NGP: the keys of their sequence, read once for all of its queries.
    """
    count = rows.stop - rows.start
    stop = first + count
    return attention_shares(gaze.q_THP[rows], k_NGP[:stop], gaze.scale, future(first, count, stop, k_NGP.device))


def recent(positions_T: Tensor, topk: int) -> Tensor:
    """int32 [T, topk]: for queries at some positions the first `SINKS` tokens (no more than half of topk) and the last
    ones that they see."""
    place_K = torch.arange(topk, device=positions_T.device)
    last_T1 = positions_T[:, None] - (topk - 1)
    selection_TK = torch.where(place_K < min(SINKS, topk // 2), place_K, last_T1 + place_K)
    return _or_everything(selection_TK, positions_T)


def random(positions_T: Tensor, topk: int, seed: int) -> Tensor:
    """int32 [T, topk]: one token from each of topk stretches, as equal as can be, of what a query sees."""
    place_K = torch.arange(topk + 1, device=positions_T.device)
    edges_TK = (positions_T[:, None] + 1) * place_K // topk
    low_TK, width_TK = edges_TK[:, :-1], edges_TK.diff(dim=1)
    draw_TK = _hash(_hash(positions_T + (seed * 0x632BE5AB & 0xFFFFFFFF))[:, None] + place_K[:-1])
    return _or_everything(low_TK + draw_TK * width_TK // 2**32, positions_T)


def _or_everything(selection_TK: Tensor, positions_T: Tensor) -> Tensor:
    """All that it sees, where that is no more than topk tokens."""
    topk = selection_TK.shape[1]
    place_K = torch.arange(topk, device=positions_T.device)
    positions_T1 = positions_T[:, None]
    all_TK = torch.where(place_K <= positions_T1, place_K, -1)
    return torch.where(positions_T1 < topk, all_TK, selection_TK).int()


def _hash(x: Tensor) -> Tensor:
    """A number from 0 to 2^32 - 1 for each, int64: the finaliser of MurmurHash3."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)


def _nobody(sight: Sight) -> None:
    """A watch that makes mixers show their gaze, which is then read from the step."""
