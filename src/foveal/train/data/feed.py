"""The feed: global batches of packed rows in an order that the seed fixes, for any number of ranks, from any step."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.train.data.corpus import Corpus, Part
from foveal.train.data.packing import Mixer
from foveal.train.data.rows import Row


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's rows of one step."""

    rows: tuple[Row, ...]
    """Each of exactly `context` tokens."""

    @property
    def sequences(self) -> list[Tensor]:
        """int64 ids of each part of a document; the target of a token is the next one of its sequence, so that the last
        token of each has none. Together they have len(rows) x context tokens."""
        return [torch.from_numpy(ids) for row in self.rows for ids in row.sequences]

    @property
    def loss_weights(self) -> list[Tensor] | None:
        """float32, like `sequences`: the weight of each token as a target. None: all 1."""
        if all(row.loss_weights is None for row in self.rows):
            return None
        return [torch.from_numpy(weights) for row in self.rows for weights in _weights(row)]

    def split(self, rows: int) -> Iterator["TrainingBatch"]:
        """Micro-batches of at most `rows` rows."""
        for start in range(0, len(self.rows), rows):
            yield TrainingBatch(self.rows[start : start + rows])


class Feed:
    """An endless iterator over batches. Of each step's rows, rank r of R takes the r-th of R equal parts, so that the
    ranks' batches one after another are the batch of a single process. `sources`: only those of these names.

    Raises ValueError where a step is not made of whole rows, or does not divide among the ranks.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        context: int,
        tokens_per_step: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        part: Part = "train",
        sources: Collection[str] | None = None,
    ) -> None:
        rows, odd = divmod(tokens_per_step, context)
        if odd or rows < 1 or rows % ranks:
            raise ValueError(
                f"tokens_per_step = {tokens_per_step} is no multiple of {ranks} x {context} (ranks x context)"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank = {rank} is not one of {ranks}")
        self._sources = corpus.open(part, context, seed)
        if sources is not None:
            self._sources = [source for source in self._sources if source.name in sources]
        missing = set(sources or ()) - {source.name for source in self._sources}
        kind = part.replace("_", "-")
        if missing:
            raise ValueError(f"source {', '.join(sorted(missing))} has no {kind} documents")
        if not self._sources:
            raise ValueError(f"no source has {kind} documents")
        self._rows = range(rows)[rows // ranks * rank : rows // ranks * (rank + 1)]
        self._rows_per_step = rows
        self._mixer = Mixer([source.weight for source in self._sources])
        self._made_of = {
            "seed": seed,
            "context": context,
            "sources": {source.name: [source.weight, source.key] for source in self._sources},
        }

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        drawn = [self._mixer.next() for _ in range(self._rows_per_step)]
        return TrainingBatch(tuple(self._sources[drawn[i][0]].rows.row(drawn[i][1]) for i in self._rows))

    @property
    def rows_given(self) -> dict[str, int]:
        """How many rows each source has given so far, over all ranks."""
        return {source.name: rows for source, rows in zip(self._sources, self._mixer.rows, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, the same on every rank, as JSON can hold it."""
        return {"rows": self.rows_given, "made_of": self._made_of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another feed of the same data stood; step size and ranks may differ.

        Raises ValueError, naming what differs, where the data is not the same.
        """
        before, now = dict(state["made_of"]), self._made_of
        changed = [name for name in now if before[name] != now[name]]
        if changed:
            was, became = ({name: given[name] for name in changed} for given in (before, now))
            raise ValueError(f"the data is not what the checkpoint was trained on: {was} became {became}")
        self._mixer.rows[:] = [state["rows"][source.name] for source in self._sources]


def _weights(row: Row) -> tuple[np.ndarray[Any, np.dtype[np.float32]], ...]:
    return row.loss_weights or tuple(np.ones(len(ids), dtype=np.float32) for ids in row.sequences)
