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
from foveal.kernels.cpu.block_parts import Layer, Norm
from foveal.kernels.cpu.block_run import BlockRun, KeyPlaces, block_run
from foveal.kernels.cpu.blocks import AnyBlock, MixerBlock
from foveal.kernels.cpu.mixer_blocks import CacheParts
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
    """x + operation(norm(x)) for several blocks, in steps for which `Step.fusable` holds; `plain` for caches that the
    kernels do not read."""

    def __init__(self, run: BlockRun, blocks: Sequence[tuple[Place, AnyBlock]], plain: Sequence[PlainPart]) -> None:
        mixers = [(place, block) for place, block in blocks if isinstance(block, MixerBlock)]
        self._run, self._plain = run, plain
        self._places = [place for place, _ in mixers]
        ropes = [block.ropes for _, block in mixers]
        self._ropes = list(dict.fromkeys(rope for both in ropes for rope in both if rope))
        place = {rope: index for index, rope in enumerate([*self._ropes, None])}
        self._rope_of = [(place[own], place[index]) for own, index in ropes]
        self._known: WeakKeyDictionary[CacheStore, KeyPlaces | None] = WeakKeyDictionary()

    def __call__(self, x_TD: Tensor, step: Step, cache: CacheStore) -> Tensor:
        """[T, D] -> [T, D]."""
        assert step.rows_T is not None
        if cache not in self._known:
            self._known[cache] = self._run.places([_parts(cache, place) for place in self._places])
        places = self._known[cache]
        if places is None:
            for part in self._plain:
                x_TD = part(x_TD, step, cache)
            return x_TD
        turns = [*map(step.turns, self._ropes), None]
        of_mixers = [(turns[own], turns[index]) for own, index in self._rope_of]
        slots_3S = step.batch.slots.block if step.batch.slots else None
        x_TD, step.selection_TK = self._run(
            x_TD, of_mixers, places, step.rows_T, step.queries, step.contexts, step.selection_TK, slots_3S
        )
        return x_TD


def fuse(layers: Sequence[Sequence[tuple[Plain, AnyBlock | None]]]) -> list[Part]:
    """All blocks in order, neighbours that can be as one call; [] where none can.

    layers: for each block how it is run alone, and how the kernels take it, if they do.
    """
    placed = [((i, j), *block) for i, layer in enumerate(layers) for j, block in enumerate(layer)]
    parts: list[Part] = []
    for fusable, group in groupby(placed, lambda one: one[2] is not None):
        members = list(group)
        run = block_run([block for _, _, block in members if block]) if fusable else None
        plain = [PlainPart(place, alone) for place, alone, _ in members]
        if run:
            parts.append(FusedRun(run, [(place, block) for place, _, block in members if block], plain))
        else:
            parts += plain
    return parts if any(isinstance(part, FusedRun) for part in parts) else []


def norm_of(norm: RMSNorm) -> Norm:
    """A norm as the kernels take it."""
    return Norm(norm.scale, norm.eps)


def layer_of(linear: Linear) -> Layer:
    """A linear layer as the kernels take it."""
    return Layer(linear.weight if linear.quantised is None else linear.quantised, linear.bias)


def _parts(cache: CacheStore, place: Place) -> CacheParts:
    block = cache.layers[place[0]][place[1]]
    assert block
    if block.state:
        return block.state.states
    return [layout.records for layout in block.paged]
