"""The look: which earlier tokens a model attended to when it chose a token, and how much of its attention they hold."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from foveal.config import ModelConfig
from foveal.config.model import BlockConfig, GQAConfig, MLAConfig, RecurrentConfig
from foveal.kernels.recall import attention_recall
from foveal.nn.watch import Sight

SightKind = Literal["sparse", "window", "dense", "recurrent"]


@dataclass(frozen=True)
class LayerSight:
    """What one mixer of a model can see: "sparse" the `reach` tokens that an indexer picks, "window" the last `reach`,
    "dense" all, "recurrent" none but through its state."""

    layer: int
    kind: SightKind
    reach: int | None = None


def layer_sights(config: ModelConfig) -> tuple[LayerSight, ...]:
    """Every mixer of a model, first layer first."""
    reach: int | None = None
    sights: list[LayerSight] = []
    for index, layer in enumerate(config.layers):
        for block in layer:
            reach = block.indexer.topk if block.indexer else reach
            if isinstance(block.operation, GQAConfig | MLAConfig | RecurrentConfig):
                sights.append(_sight(index, block, reach))
    return tuple(sights)


def sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """For each sparse layer, first to last, whether it has an indexer of its own."""
    return tuple(block.indexer is not None for block in config.blocks if block.indexer or block.shared_selection)


def _sight(layer: int, block: BlockConfig, topk: int | None) -> LayerSight:
    if isinstance(block.operation, RecurrentConfig):
        return LayerSight(layer, "recurrent")
    if block.indexer or block.shared_selection:
        return LayerSight(layer, "sparse", topk)
    window = block.operation.window if isinstance(block.operation, GQAConfig) else None
    return LayerSight(layer, "dense") if window is None else LayerSight(layer, "window", window)


Runs: TypeAlias = "array[int]"
"""Positions in order, as (first, last + 1) of each unbroken run: array("i", [0, 4, 7, 8]) is 0, 1, 2, 3, 7."""


@dataclass(frozen=True)
class TokenSelection:
    """What was selected when one token was chosen."""

    seen: int
    """Tokens before it: what could be selected."""
    layers: tuple[Runs, ...]
    """For each sparse layer, first to last, the positions it attended to."""
    recall: tuple[float | None, ...]
    """For each sparse layer the share of its dense attention, averaged over heads, that falls on them; None for a layer
    that uses another's selection."""


class Recorder:
    """Takes down what the last tokens of some sequences select while a step runs."""

    def __init__(self, sparse: Sequence[bool], lengths: Mapping[int, int]) -> None:
        """`sparse`: for each sparse layer, whether it has an indexer of its own. `lengths`: by batch row, each the last
        of its sequence, the tokens that are seen from it."""
        self._sparse = tuple(sparse)
        self._lengths = lengths
        self._recall: dict[int, list[float]] = {row: [] for row in lengths}

    def watch(self, sight: Sight) -> None:
        """One layer, while its queries and keys are at hand (see `foveal.nn.watch`)."""
        for sequence, (first, count, _) in enumerate(sight.queries):
            row = first + count - 1
            if row in self._lengths:
                self._recall[row].append(self._recall_of(sight, sequence, row))

    def selections(self, collected: Mapping[str, list[Any]]) -> dict[int, TokenSelection]:
        """By row; `collected` is what the step collected."""
        layers: list[Tensor | None] = collected.get("selection", [])
        assert len(layers) == len(self._sparse)
        return {
            row: TokenSelection(
                seen=seen,
                layers=tuple(_runs(_chosen(selection_TK, row, seen), seen) for selection_TK in layers),
                recall=self._by_layer(self._recall[row]),
            )
            for row, seen in self._lengths.items()
        }

    def _recall_of(self, sight: Sight, sequence: int, row: int) -> float:
        seen, gaze = self._lengths[row], sight.gaze
        chosen_K = _chosen(sight.selection_TK, row, seen)
        if chosen_K is None:
            return 1.0
        return attention_recall(gaze.q_THP[row], gaze.keys, sequence, seen, chosen_K, scale=gaze.scale)

    def _by_layer(self, recall: list[float]) -> tuple[float | None, ...]:
        values = iter(recall)
        return tuple(next(values) if own else None for own in self._sparse)


def _chosen(selection_TK: Tensor | None, row: int, seen: int) -> Tensor | None:
    """int32 [K]: the row's positions; None: all."""
    if selection_TK is None or seen <= selection_TK.shape[1]:
        return None
    selection_K = selection_TK[row]
    return selection_K[selection_K >= 0]


def _runs(chosen_K: Tensor | None, seen: int) -> Runs:
    if chosen_K is None:
        return array("i", [0, seen])
    places_K = chosen_K.cpu()
    starts_K = torch.ones_like(places_K, dtype=torch.bool)
    starts_K[1:] = places_K[1:] != places_K[:-1] + 1
    firsts = places_K[starts_K]
    lasts = places_K[starts_K.roll(-1)] + 1
    return array("i", torch.stack((firsts, lasts), 1).flatten().tolist())
