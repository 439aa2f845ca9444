"""Rows: what a source gives, each of exactly `context` tokens, by number, so that any of them can be had at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foveal.train.data.packing import Epoch, pack_epoch, row_count, shuffled
from foveal.train.data.shards import Shard

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """Parts of documents that together have `context` tokens; nothing attends from one to another."""

    sequences: tuple[Ids, ...]
    loss_weights: tuple[Weights, ...] | None = None
    """Weight of each token as a target. None: all 1."""


class RowSource(Protocol):
    """An endless, fixed list of rows."""

    def row(self, number: int) -> Row:
        """The row of this number, the same at every call and on every machine."""
        ...


_PORTION = 1 << 17
"""Documents packed together: about a second's work, and what has to be in memory."""


class TextRows:
    """Some documents of a shard, pass after pass, each pass packed anew.

    Many documents are packed in portions, each a random choice of them that is the same in every pass.
    """

    def __init__(self, shard: Shard, documents: Ids, context: int, seed: Sequence[int]) -> None:
        self._shard, self._context, self._seed = shard, context, tuple(seed)
        count = -(-len(documents) // _PORTION)
        order = shuffled(len(documents), *seed) if count > 1 else np.arange(len(documents))
        self._portions = [documents[np.sort(order[i::count])] for i in range(count)]
        self._lengths = shard.lengths
        rows = [row_count(self._lengths[portion], context) for portion in self._portions]
        self._ends = np.cumsum(rows)
        self._packed: tuple[int, Epoch] | None = None

    def row(self, number: int) -> Row:
        """Row `number` of all passes; the first row of a portion packs it (some microseconds a document)."""
        epoch, index = divmod(number, int(self._ends[-1]))
        turn = int(np.searchsorted(self._ends, index, side="right"))
        portion = self._portions[turn]
        index -= int(self._ends[turn - 1]) if turn else 0
        turn += epoch * len(self._portions)
        if self._packed is None or self._packed[0] != turn:
            self._packed = turn, pack_epoch(self._lengths[portion], self._context, *self._seed, turn)
        pieces = self._packed[1].row(index)
        return Row(tuple(self._shard.read(int(portion[d]), start, length) for length, d, start in pieces))
