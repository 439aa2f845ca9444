"""How good selections are, layer by layer: how much of dense attention they keep, against others of the same size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.evaluate.estimate import Estimate, of_groups
from foveal.evaluate.perplexity import Advance
from foveal.evaluate.prefill import Prefill
from foveal.evaluate.text import Window
from foveal.kernels import select
from foveal.kernels.dense import widened
from foveal.kernels.divergence import context_tiles, future
from foveal.kernels.selection import index_scores
from foveal.models.decoder import Decoder
from foveal.nn.indexer import Indexer
from foveal.nn.selectors import gaze_shares, random, recent
from foveal.nn.watch import Glance, Sight

# Queries that make a group of a standard error: neighbours look at much the same.
_STRETCH = 64

MEASURES = ("recall", "recency", "random", "oracle", "divergence", "query_overlap", "layer_overlap")


@dataclass(frozen=True)
class LayerQuality:
    """One sparse layer, means over all queries that see more than top-k tokens."""

    layer: int
    """Which of the model's indexers, from 0."""
    recall: Estimate
    """Share of dense attention (averaged over heads) that lies on the selected tokens."""
    recency: Estimate
    """The same of a selection of 4 sinks and the most recent tokens,"""
    random: Estimate
    """of a random one,"""
    oracle: Estimate
    """and of the best one, all of the same size."""
    divergence: Estimate
    """KL(dense attention || softmax of the index scores) over all that a query sees, in nats."""
    query_overlap: Estimate
    """Intersection over union of the selections of neighbouring queries."""
    layer_overlap: Estimate | None
    """The same with the indexer before this one; None for the first."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        estimates = {name: getattr(self, name) for name in MEASURES}
        return {"layer": self.layer} | {name: one and one.as_dict() for name, one in estimates.items()}


def over_layers(qualities: Sequence[LayerQuality]) -> dict[str, float]:
    """The mean of every measure over the layers that have it."""
    found = {name: [getattr(one, name).mean for one in qualities if getattr(one, name)] for name in MEASURES}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


@torch.no_grad()
def selection_quality(
    decoder: Decoder,
    windows: Sequence[Window],
    advance: Advance | None = None,
    *,
    kv_cache_dtype: str = "auto",
    dense: bool = False,
) -> list[LayerQuality]:
    """Quality of the selections of every indexer on some windows, in memory that is linear in their length.

    `dense`: hidden states are those of dense attention (what an indexer's warm-up trains on), not those of the model as
    it runs. Raises ValueError where the model has no indexer, or no window is longer than its top-k.
    """
    meters = [_Meter() for block in decoder.config.blocks if block.indexer]
    if not meters:
        raise ValueError(f"the model has no indexer ({decoder.config.family} without an adapter): nothing selects")
    topk = _topk(decoder)
    longest = max(len(window.ids) for window in windows)
    if longest <= topk:
        raise ValueError(f"windows of {longest} tokens leave a top-k of {topk} nothing to choose: they must be longer")
    prefill = Prefill(decoder, longest, kv_cache_dtype=kv_cache_dtype, dense=dense)
    for window in windows:
        for meter in meters:
            meter.begin(len(window.ids))
        watch = _Watch(meters, topk)
        for _ in prefill.run(window.ids, watch=watch):
            watch.next_chunk()
        if advance:
            advance(len(window.ids))
    return [meter.quality(layer) for layer, meter in enumerate(meters)]


def _topk(decoder: Decoder) -> int:
    """What the indexers choose now: `selecting` may have changed it."""
    return next(module.config.topk for module in decoder.modules() if isinstance(module, Indexer))


class _Meter:
    """What is known of one layer: for each window and measure a value at each position, -inf where there is none.

    Room for all of them is made at once: small results that stay between large ones that go would tear memory apart.
    """

    def __init__(self) -> None:
        self._windows: list[dict[str, Tensor]] = []

    def begin(self, length: int) -> None:
        """Another window."""
        self._windows.append({name: torch.full((length,), float("-inf")) for name in MEASURES})

    def put(self, name: str, first: int, values_t: Tensor) -> None:
        """Values at positions `first`, `first` + 1, ... of the last window."""
        self._windows[-1][name][first : first + len(values_t)] = values_t.float().cpu()

    def quality(self, layer: int) -> LayerQuality:
        """Means over all windows."""
        found: dict[str, Any] = {}
        for name in MEASURES:
            values = torch.cat([window[name] for window in self._windows])
            known = values[~values.isneginf()]
            found[name] = _estimate(known) if len(known) else None
        return LayerQuality(layer, **found)


def _estimate(values: Tensor) -> Estimate:
    stretches = values.split(_STRETCH)
    return of_groups(torch.stack([one.sum() for one in stretches]), torch.tensor([len(one) for one in stretches]))


class _Watch:
    """Measures what each indexer's block shows, chunk by chunk of one sequence."""

    def __init__(self, meters: Sequence[_Meter], topk: int) -> None:
        self._meters, self._topk = meters, topk
        self._last_TK: list[Tensor | None] = [None] * len(meters)
        """Each layer's selection of the last query before this chunk, [1, K]."""
        self._layer = 0
        self._above_TK: Tensor | None = None

    def next_chunk(self) -> None:
        """All layers have been seen."""
        self._layer, self._above_TK = 0, None

    def __call__(self, sight: Sight) -> None:
        """See `foveal.nn.watch.Watch`."""
        layer, self._layer = self._layer, self._layer + 1
        (first,), length = sight.queries.positions, sight.queries.offsets[-1]
        skipped = max(0, self._topk - first)
        """Queries that see no more than top-k tokens: every selection of theirs is perfect."""
        if skipped >= length:
            return
        chosen_TK = sight.selection_TK
        if chosen_TK is None:
            glance = sight.glance
            chosen_TK = select(glance.q_TIJ, glance.weights_TI, glance.keys, sight.queries, topk=self._topk)
        meter = self._meters[layer]
        self._compare_selections(meter, layer, first + skipped, chosen_TK[skipped:])
        self._measure(meter, sight, chosen_TK, skipped)

    def _compare_selections(self, meter: _Meter, layer: int, first: int, chosen_TK: Tensor) -> None:
        last_1K = self._last_TK[layer]
        if last_1K is None:
            meter.put("query_overlap", first + 1, overlap(chosen_TK[1:], chosen_TK[:-1]))
        else:
            meter.put("query_overlap", first, overlap(chosen_TK, torch.cat((last_1K, chosen_TK[:-1]))))
        self._last_TK[layer] = chosen_TK[-1:].clone()
        if self._above_TK is not None:
            meter.put("layer_overlap", first, overlap(chosen_TK, self._above_TK))
        self._above_TK = chosen_TK

    def _measure(self, meter: _Meter, sight: Sight, chosen_TK: Tensor, skipped: int) -> None:
        """One tile of queries at a time; keys are read once."""
        topk, heads = self._topk, max(sight.gaze.q_THP.shape[1], sight.glance.q_TIJ.shape[1])
        (length,) = sight.gaze.keys.contexts.lengths
        k_NGP, k_NJ = (widened(source.context(0, 0, length)) for source in (sight.gaze.keys, sight.glance.keys))
        for _, rows, first in context_tiles(sight.queries, heads):
            if rows.stop <= skipped:
                continue
            lower = max(rows.start, skipped)
            rows, first = slice(lower, rows.stop), first + lower - rows.start
            shares_tN = gaze_shares(sight.gaze, k_NGP, rows, first)
            positions_t = torch.arange(first, first + rows.stop - rows.start, device=shares_tN.device)
            rivals = {
                "recall": chosen_TK[rows],
                "recency": recent(positions_t, topk),
                "random": random(positions_t, topk, seed=self._layer),
            }
            for name, chosen_tK in rivals.items():
                meter.put(name, first, kept_share(shares_tN, chosen_tK))
            meter.put("oracle", first, shares_tN.topk(topk, sorted=False).values.sum(-1))
            meter.put("divergence", first, _divergence(shares_tN, sight.glance, k_NJ, rows, first))


def kept_share(shares_tN: Tensor, chosen_tK: Tensor) -> Tensor:
    """[t]: the sum of each query's shares at its selection, int [t, K], -1 = none."""
    return shares_tN.gather(1, chosen_tK.clamp_min(0).long()).masked_fill(chosen_tK < 0, 0.0).sum(-1)


def overlap(chosen_TK: Tensor, others_TK: Tensor) -> Tensor:
    """[T]: intersection over union of two selections of each query, ascending, -1 last; 1 where both are empty."""
    most = torch.iinfo(torch.int32).max
    # Nothing equals nothing: what is missing becomes a different number on each side, and stays last.
    mine_TK = torch.where(chosen_TK < 0, most - 1, chosen_TK).contiguous()
    theirs_TK = torch.where(others_TK < 0, most, others_TK).contiguous()
    place_TK = torch.searchsorted(theirs_TK, mine_TK).clamp_max(theirs_TK.shape[1] - 1)
    shared_T = (theirs_TK.gather(1, place_TK) == mine_TK).sum(-1)
    union_T = (chosen_TK >= 0).sum(-1) + (others_TK >= 0).sum(-1) - shared_T
    return torch.where(union_T > 0, shared_T / union_T.clamp_min(1), 1.0)


def _divergence(shares_tN: Tensor, glance: Glance, k_NJ: Tensor, rows: slice, first: int) -> Tensor:
    """[t]: KL(shares || softmax(index scores)) (DeepSeek-V3.2 report, equation 3)."""
    count, stop = shares_tN.shape
    hidden_tN = future(first, count, stop, k_NJ.device)
    scores_tN = index_scores(glance.q_TIJ[rows], glance.weights_TI[rows], k_NJ[:stop]).masked_fill_(
        hidden_tN, float("-inf")
    )
    log_tN = scores_tN.log_softmax(-1).masked_fill_(hidden_tN, 0.0)
    return (torch.special.xlogy(shares_tN, shares_tN) - shares_tN * log_tN).sum(-1)
