"""Runs of blocks as one compiled call: a decode step of a small model would spend half its time between its operations.

What a block computes is defined by its modules alone; here is only how the kernels get at their weights and caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from weakref import WeakKeyDictionary

from torch import Tensor

from foveal.cache.layouts import BlockCache
from foveal.cache.store import CacheStore
from foveal.kernels import Rows
from foveal.kernels.cpu.block import AnyBlock, BlockRun, GQABlock, KeyPlaces, Layer, Norm, block_run
from foveal.nn.linear import Linear
from foveal.nn.norm import RMSNorm
from foveal.nn.step import Step

Place = tuple[int, int]
"""A block's layer, and its place in there."""


Plain = Callable[[Tensor, Step, BlockCache | None], Tensor]
Part = Callable[[Tensor, Step, CacheStore], Tensor]
"""One or several of a decoder's blocks, [T, D] -> [T, D]."""


@dataclass(frozen=True)
class PlainPart:
    """One block as it is."""

    place: Place
    block: Plain

    def __call__(self, x_TD: Tensor, step: Step, cache: CacheStore) -> Tensor:
        """[T, D] -> [T, D]."""
        layer, place = self.place
        return self.block(x_TD, step, cache.layers[layer][place])


class FusedRun:
    """x + operation(norm(x)) for several blocks, in steps for which `Step.fusable` holds."""

    def __init__(self, run: BlockRun, blocks: Sequence[tuple[Place, AnyBlock]]) -> None:
        attention = [(place, block) for place, block in blocks if isinstance(block, GQABlock)]
        self._run = run
        self._places = [place for place, _ in attention]
        ropes = [block.config.rope for _, block in attention]
        self._ropes = list(dict.fromkeys(rope for rope in ropes if rope))
        self._rope_of = [self._ropes.index(rope) if rope else None for rope in ropes]
        self._known: WeakKeyDictionary[CacheStore, KeyPlaces] = WeakKeyDictionary()

    def __call__(self, x_TD: Tensor, step: Step, cache: CacheStore) -> Tensor:
        """[T, D] -> [T, D]."""
        assert step.rows_T is not None
        places = self._known.get(cache)
        if places is None:
            places = self._known[cache] = self._run.places([_keys_and_values(cache, place) for place in self._places])
        turns = [step.turns(rope) for rope in self._ropes]
        of_blocks = [None if index is None else turns[index] for index in self._rope_of]
        return self._run(x_TD, of_blocks, places, step.rows_T, step.queries, step.contexts)


def fuse(layers: Sequence[Sequence[tuple[Plain, AnyBlock | None]]]) -> list[Part]:
    """All blocks in order, neighbours that can be as one call; [] where none can.

    layers: for each block how it is run alone, and how the kernels take it, if they do.
    """
    placed = [((i, j), *block) for i, layer in enumerate(layers) for j, block in enumerate(layer)]
    parts: list[Part] = []
    for fusable, group in groupby(placed, lambda one: one[2] is not None):
        members = list(group)
        run = block_run([block for _, _, block in members if block]) if fusable else None
        if run:
            parts.append(FusedRun(run, [(place, block) for place, _, block in members if block]))
        else:
            parts += [PlainPart(place, plain) for place, plain, _ in members]
    return parts if any(isinstance(part, FusedRun) for part in parts) else []


def norm_of(norm: RMSNorm) -> Norm:
    """A norm as the kernels take it."""
    return Norm(norm.scale, norm.eps)


def layer_of(linear: Linear) -> Layer:
    """A linear layer as the kernels take it."""
    return Layer(linear.weight if linear.quantised is None else linear.quantised, linear.bias)


def _keys_and_values(cache: CacheStore, place: Place) -> tuple[Tensor, Tensor]:
    block = cache.layers[place[0]][place[1]]
    assert block and block.keys and block.values
    keys, values = block.keys.records, block.values.records
    assert isinstance(keys, Rows) and isinstance(values, Rows)
    return keys.values, values.values
