"""Residual blocks one after another in one call (csrc/kernels/block.h)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from foveal.kernels.cpu.block_parts import CachedRows, pairs_of
from foveal.kernels.cpu.blocks import AnyBlock, MixerBlock
from foveal.kernels.cpu.library import Kernels, address, instruction_sets
from foveal.kernels.cpu.mixer_blocks import CacheParts, GQABlock, MLABlock
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.keys import Contexts, Queries

Turns = tuple[Tensor | None, Tensor | None]
"""Of one mixer, and of its indexer: see `apply_rope`; None without rope."""


@dataclass(frozen=True)
class KeyPlaces:
    """Where the mixers' caches are: checked addresses, for as long as their tensors live."""

    caches: list[list[tuple[int, int, int]]]
    rows: int
    """Of keys; -1 where no block has any."""
    slots: int
    """Of recurrent states; 0 where no block has any."""


class BlockRun:
    """Blocks that follow one another, all fusable and of one dtype."""

    def __init__(self, kernels: Kernels, blocks: Sequence[AnyBlock]) -> None:
        assert blocks and all(block.fusable for block in blocks)
        self._blocks = list(blocks)  # keeps the weights alive
        self._mixers = [block for block in blocks if isinstance(block, MixerBlock)]
        self._pairs = [pairs_of(rope) for block in self._mixers for rope in block.ropes]
        indexers = [one.indexer for one in self._mixers if isinstance(one, GQABlock | MLABlock) and one.indexer]
        self._topk = max((indexer.config.topk for indexer in indexers), default=0)
        self._like_1D = blocks[0].norm.weight_X[None]
        assert all(block.norm.weight_X.dtype == self._like_1D.dtype for block in blocks)
        self._run = kernels.run.run_blocks
        self._native = kernels.run.Blocks([block.native(kernels) for block in blocks])

    def places(self, caches: Sequence[CacheParts]) -> KeyPlaces | None:
        """The cache of each mixer in order; None where one is kept in a form that the kernels do not read.
        ValueError where they do not fit."""
        stored = [block.cached(parts) for block, parts in zip(self._mixers, caches, strict=True)]
        known: list[CachedRows] = [one for one in stored if one]
        if len(known) < len(stored):
            return None
        has_keys = [isinstance(block, GQABlock | MLABlock) for block in self._mixers]
        rows = min((one.rows for one, keys in zip(known, has_keys, strict=True) if keys), default=-1)
        slots = min((one.rows for one, keys in zip(known, has_keys, strict=True) if not keys), default=0)
        return KeyPlaces([one.parts for one in known], rows, slots)

    def __call__(
        self,
        x_TD: Tensor,
        turns: Sequence[Turns],
        places: KeyPlaces,
        rows_T: Tensor,
        queries: Queries,
        contexts: Contexts,
        selection_TK: Tensor | None = None,
        slots_3S: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, D] -> [T, D], and the selection of the last indexer (None: everything is attended to).

        turns: of each mixer. rows_T: int64 cache rows of the tokens' own keys, which are written.
        selection_TK: int32, contiguous, of a block before these. slots_3S: int64, contiguous: where the states of each
        sequence come from, where they go to, and whether they are fresh; for recurrent blocks.

        ValueError where anything does not fit, or a row or page is not in the cache.
        """
        tokens, hidden = x_TD.shape
        like_1D = self._like_1D
        if hidden != like_1D.shape[1] or x_TD.dtype != like_1D.dtype or not x_TD.is_contiguous():
            raise ValueError(
                f"x is {x_TD.dtype} {list(x_TD.shape)}, the blocks take {like_1D.dtype} [T, {like_1D.shape[1]}]"
            )
        if len(rows_T) != tokens:
            raise ValueError(f"{tokens} tokens, but {len(rows_T)} rows to keep them at")
        for pairs, of_block in zip(self._pairs, chain.from_iterable(turns), strict=True):
            shape = (0, 0) if of_block is None else of_block.shape
            if pairs and shape != (tokens, pairs):
                raise ValueError(f"turns have shape {list(shape)}, not {[tokens, pairs]}")
        if places.slots and (slots_3S is None or slots_3S.shape != (3, len(queries.positions))):
            raise ValueError(f"{len(queries.positions)} sequences, but no slots for their states, or not as many")
        out_TD = torch.empty_like(x_TD)
        room_X = x_TD.new_empty(tokens * self._topk, dtype=torch.int32)
        topk = self._run(
            self._native,
            address(x_TD),
            address(out_TD),
            tokens,
            [(address(own), address(index)) for own, index in turns],
            address(rows_T),
            places.caches,
            places.rows,
            (address(slots_3S) if places.slots else 0, places.slots),
            sequence_arguments(tokens, queries, contexts),
            (address(selection_TK), 0 if selection_TK is None else selection_TK.shape[1], address(room_X)),
            torch.get_num_threads(),
        )
        if not self._topk:
            return out_TD, selection_TK
        return out_TD, room_X[: tokens * topk].view(tokens, topk) if topk else None


def block_run(blocks: Sequence[AnyBlock], isa: str | None = None) -> BlockRun | None:
    """The blocks as one call; None where there are no compiled kernels. isa: the instruction set (None: the best)."""
    usable = [kernels for kernels in instruction_sets() if isa in (None, kernels.isa)]
    return BlockRun(usable[-1], blocks) if usable else None
