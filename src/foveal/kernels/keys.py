"""Where a kernel finds queries and keys: packed rows of one batch, or pages of a cache behind a page table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels.transfer import send


def _copied(copies: dict[tuple[str, torch.device], Tensor], name: str, source: Tensor, device: torch.device) -> Tensor:
    """What `source` is on a device: copied the first time, without waiting for it."""
    if (name, device) not in copies:
        copies[name, device] = send(source, device)
    return copies[name, device]


class LengthsUnknownError(RuntimeError):
    """A version that must know contexts' lengths was given bounds."""


@dataclass(frozen=True)
class Queries:
    """Which packed rows are whose queries, and where they stand.

    Sequence s owns rows `offsets[s]` to `offsets[s + 1]`; its first query stands at position `positions[s]`, the others
    follow one by one.
    """

    offsets: tuple[int, ...]
    positions: tuple[int, ...]
    actual: Tensor | None = field(default=None, compare=False)
    """`block` on the device, where the host knows no more of `positions` than bounds."""

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(first row, number of rows, first position) of each sequence."""
        for (start, stop), position in zip(pairwise(self.offsets), self.positions, strict=True):
            yield start, stop - start, position

    @property
    def lengths(self) -> tuple[int, ...]:
        """Queries of each sequence."""
        return tuple(stop - start for start, stop in pairwise(self.offsets))

    @cached_property
    def block(self) -> Tensor:
        """int64 [2 S + 1]: offsets, then positions, for kernels that take addresses."""
        return torch.tensor((*self.offsets, *self.positions), dtype=torch.int64)

    def block_on(self, device: torch.device) -> Tensor:
        """`block` on a device, copied once."""
        if self.actual is not None:
            return self.actual
        return _copied(self._copies, "block", self.block, device)

    def sequence_on(self, device: torch.device) -> Tensor:
        """int32 [T] on a device, copied once: the sequence of each packed row."""
        if self.single:
            return torch.arange(len(self.positions), dtype=torch.int32, device=device)
        return _copied(self._copies, "sequence", self._sequence, device)

    @cached_property
    def _sequence(self) -> Tensor:
        lengths_S = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.arange(len(lengths_S), dtype=torch.int32).repeat_interleave(lengths_S)

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    @cached_property
    def single(self) -> bool:
        """Every sequence has one query (a decode step)."""
        return self.offsets == tuple(range(len(self.positions) + 1))


@dataclass(frozen=True)
class Contexts:
    """Which stored rows are the keys of each sequence, in order of position."""

    lengths: tuple[int, ...]
    """Keys of each sequence."""
    starts: tuple[int, ...]
    """First row of a sequence whose rows follow one another, otherwise -1."""
    table_SB: Tensor | None = None
    """int64 page ids by sequence; None: every sequence's rows follow one another."""
    actual: Tensor | None = field(default=None, compare=False)
    """`block` on the device, where the host knows no more of `lengths` than bounds."""

    @cached_property
    def block(self) -> Tensor:
        """int64 [2 S]: lengths, then starts, for kernels that take addresses."""
        return torch.tensor((*self.lengths, *self.starts), dtype=torch.int64)

    def block_on(self, device: torch.device) -> Tensor:
        """`block` on a device, copied once."""
        if self.actual is not None:
            return self.actual
        return _copied(self._copies, "block", self.block, device)

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    @staticmethod
    def packed(lengths: Sequence[int]) -> "Contexts":
        """Rows of one batch, sequence after sequence."""
        return Contexts(tuple(lengths), tuple(accumulate(lengths, initial=0))[:-1])

    @staticmethod
    def paged(table_SB: Tensor, lengths: Sequence[int]) -> "Contexts":
        """Pages of a cache; a sequence whose pages happen to follow one another is read in place.

        Not on a GPU, whose kernels read through the table anyway: the host would have to wait for the answer.
        """
        if table_SB.device.type == "cuda":
            return Contexts(tuple(lengths), (-1,) * len(lengths), table_SB)
        last_S1 = (torch.tensor(lengths, device=table_SB.device)[:, None] - 1) // PAGE_SIZE
        place_B = torch.arange(1, table_SB.shape[1], device=table_SB.device)
        follows_SB = (table_SB[:, 1:] == table_SB[:, :-1] + 1) | (place_B > last_S1)
        starts_S = torch.where(follows_SB.all(1), table_SB[:, 0] * PAGE_SIZE, -1)
        return Contexts(tuple(lengths), tuple(starts_S.tolist()), table_SB)

    def only(self, sequences: Sequence[int]) -> "Contexts":
        """The contexts of some sequences."""
        if len(sequences) == len(self.lengths):  # ascending, so all of them
            return self
        lengths, starts = (tuple(values[s] for s in sequences) for values in (self.lengths, self.starts))
        if self.table_SB is None:
            return Contexts(lengths, starts)
        members_S = send(torch.tensor(list(sequences)), self.table_SB.device)
        return Contexts(lengths, starts, self.table_SB[members_S])

    @cached_property
    def padded_SN(self) -> Tensor:
        """int64 rows of every position up to the longest context, of pages. Past a sequence's length its last row is
        named again: what it does not own may hold anything, NaN included."""
        assert self.table_SB is not None
        self._check_known()
        last_S1 = self.block_on(self.table_SB.device)[: len(self.lengths), None] - 1
        positions_SN = torch.arange(max(self.lengths), device=self.table_SB.device).minimum(last_S1)
        return self.table_SB.gather(1, positions_SN // PAGE_SIZE) * PAGE_SIZE + positions_SN % PAGE_SIZE

    def rows(self, sequence: int, start: int, stop: int) -> Tensor | slice:
        """The rows of positions [start, stop) of a sequence: a slice where they follow one another."""
        self._check_known()
        if self.starts[sequence] >= 0:
            return slice(self.starts[sequence] + start, self.starts[sequence] + stop)
        assert self.table_SB is not None
        return self.locate(sequence, torch.arange(start, stop, device=self.table_SB.device))

    def _check_known(self) -> None:
        if self.actual is not None:
            raise LengthsUnknownError("the host only knows bounds of the contexts' lengths")

    def locate(self, sequence: int, positions: Tensor) -> Tensor:
        """int64 rows of some positions (any shape, int) of a sequence."""
        positions = positions.long()
        if self.starts[sequence] >= 0:
            return positions + self.starts[sequence]
        assert self.table_SB is not None
        return self.table_SB[sequence][positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE


class Records(Protocol):
    """Stored rows and how they are read; the record formats are in `foveal.kernels.records`."""

    def read(self, rows: Tensor | slice) -> Tensor:
        """The values of some rows: int64 rows of any shape, or a slice; adds the shape of one row."""


def take_rows(values: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of dimension 0: a view for a slice, otherwise copies, in the shape of `rows`."""
    if isinstance(rows, slice):
        return values[rows]
    # Several times faster than indexing, which does not copy whole rows at a time.
    return values.index_select(0, rows.flatten()).unflatten(0, rows.shape)


@dataclass(frozen=True)
class KeySource:
    """Keys (or values) of every sequence of a batch."""

    records: Records
    contexts: Contexts

    def context(self, sequence: int, start: int, stop: int) -> Tensor:
        """Rows of positions [start, stop) of a sequence: [stop - start, ...]."""
        return self.records.read(self.contexts.rows(sequence, start, stop))

    def padded(self) -> Tensor:
        """Every sequence's rows [G, P] side by side by head, [S, G, longest, P]; past a sequence's length they mean
        nothing."""
        rows_SN = self.contexts.padded_SN
        if not isinstance(self.records, Rows):
            return self.records.read(rows_SN).transpose(1, 2)
        # Gathered head by head, which saves a copy of everything into that order.
        values_RGP = self.records.values
        groups = values_RGP.shape[1]
        head_G1 = torch.arange(groups, device=rows_SN.device)[:, None]
        return take_rows(values_RGP.flatten(0, 1), rows_SN[:, None] * groups + head_G1)

    def select(self, sequence: int, positions_TK: Tensor) -> Tensor:
        """Rows of chosen positions (all >= 0) of a sequence: [T, K, ...]."""
        return self.records.read(self.contexts.locate(sequence, positions_TK))

    def only(self, sequences: Sequence[int]) -> "KeySource":
        """The keys of some sequences."""
        return replace(self, contexts=self.contexts.only(sequences))


@dataclass(frozen=True)
class Rows:
    """Plain rows of numbers, [rows, ...]: this batch's own keys, or a cache that stores values as they are."""

    values: Tensor

    def read(self, rows: Tensor | slice) -> Tensor:
        """See `Records.read`."""
        return take_rows(self.values, rows)


@dataclass(frozen=True)
class Columns:
    """The first `count` numbers of each row of other records (the latent part of a latent record is its value)."""

    records: Records
    count: int

    def read(self, rows: Tensor | slice) -> Tensor:
        """See `Records.read`."""
        return self.records.read(rows)[..., : self.count]


@dataclass(frozen=True)
class OneHead:
    """Records of one key for all heads, with the head axis that `attention` expects."""

    records: Records

    def read(self, rows: Tensor | slice) -> Tensor:
        """See `Records.read`."""
        return self.records.read(rows).unsqueeze(-2)
