"""Rows: what a source gives, each of exactly `context` tokens, by number, so that any of them can be had at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foveal.train.data.packing import Epoch, pack_epoch, row_count
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


class TextRows:
    """Some documents of a shard, pass after pass, each pass packed anew."""

    def __init__(self, shard: Shard, documents: Ids, context: int, seed: Sequence[int]) -> None:
        self._shard, self._documents, self._context, self._seed = shard, documents, context, tuple(seed)
        self._lengths = shard.lengths[documents]
        self._rows = row_count(self._lengths, context)
        self._epoch: tuple[int, Epoch] | None = None

    def row(self, number: int) -> Row:
        """Row `number` of all passes; the first row of a pass packs it (a few microseconds a document)."""
        epoch, index = divmod(number, self._rows)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, pack_epoch(self._lengths, self._context, *self._seed, epoch)
        pieces = self._epoch[1].row(index)
        return Row(tuple(self._shard.read(int(self._documents[d]), start, length) for length, d, start in pieces))
