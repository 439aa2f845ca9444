"""What one layer keeps for each token or sequence, behind the page ids and slot numbers of the manager."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE, index_key_bytes, latent_bytes
from foveal.kernels import Rows
from foveal.kernels.keys import Records, take_rows
from foveal.kernels.records import IndexKeyRecords, LatentRecords, RoundedRows
from foveal.kernels.transfer import send, upload


class PagedLayout(Protocol):
    """Rows in pages of 64. Row r is place r % 64 of page r // 64."""

    @property
    def records(self) -> Records:
        """How kernels read the rows."""

    @property
    def pages(self) -> Tensor:
        """The storage, one page a row of dimension 0."""

    def write(self, rows_T: Tensor, values_TX: Tensor) -> None:
        """Store values at int64 rows."""


class PlainLayout:
    """Values as they are, [B, 64, ...]: keys and values by head, unquantised latents and index keys. read_as: the dtype
    they are computed with, where it is another."""

    def __init__(
        self,
        pages: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        read_as: torch.dtype | None = None,
    ) -> None:
        self.pages = _allocate((pages, PAGE_SIZE, *shape), dtype, device)
        self._rows = self.pages.flatten(0, 1)
        self.records: Records = Rows(self._rows) if read_as in (None, dtype) else RoundedRows(self._rows, read_as)

    def write(self, rows_T: Tensor, values_TX: Tensor) -> None:
        """See `PagedLayout.write`."""
        self._rows[rows_T] = values_TX.to(self._rows.dtype)


class LatentLayout:
    """Latent and rope key of MLA as the fp8 record (656 bytes a token for DeepSeek-V3)."""

    def __init__(self, pages: int, rank: int, rope_dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.pages = _allocate((pages, PAGE_SIZE, latent_bytes(rank, rope_dim, "fp8")), torch.uint8, device)
        self.records = LatentRecords(self.pages.flatten(0, 1), rank, dtype)

    def write(self, rows_T: Tensor, values_TX: Tensor) -> None:
        """See `PagedLayout.write`."""
        self.records.write(rows_T, values_TX)


class IndexKeyLayout:
    """Index keys as "fp8" or "int8" with a scale each (132 bytes a token for DeepSeek-V3.2)."""

    def __init__(self, pages: int, head_dim: int, dtype: str, device: torch.device | str) -> None:
        self.pages = _allocate((pages, PAGE_SIZE * index_key_bytes(head_dim, dtype)), torch.uint8, device)
        self.records = IndexKeyRecords(self.pages, head_dim, dtype)

    def write(self, rows_T: Tensor, values_TX: Tensor) -> None:
        """See `PagedLayout.write`."""
        self.records.write(rows_T, values_TX)


@dataclass(frozen=True)
class StateSlots:
    """Where recurrent layers find and leave each sequence's state."""

    slots_in: tuple[int, ...]
    slots_out: tuple[int, ...]
    fresh: tuple[bool, ...]
    """True: the sequence starts here, from a zero state; slots_in is not read."""
    rows_S: Tensor | None = None
    """int64 [S]: the slots, in and out, where the device alone knows them (CUDA graphs); none is fresh."""

    @cached_property
    def block(self) -> Tensor:
        """int64 [3, S]: slots in, slots out, whether fresh, for kernels that take addresses."""
        return torch.tensor((self.slots_in, self.slots_out, self.fresh), dtype=torch.int64)

    def rows_in(self, device: torch.device) -> Tensor | slice:
        """Where states are read. Slots that follow one another are a slice: read in place and written in one go."""
        return self._rows(self.slots_in, device)

    def rows_out(self, device: torch.device) -> Tensor | slice:
        """Where states are written."""
        return self._rows(self.slots_out, device)

    def fresh_on(self, device: torch.device) -> Tensor | None:
        """bool [S] on a device; None: none is."""
        return send(torch.tensor(self.fresh), device) if any(self.fresh) else None

    @cached_property
    def _known(self) -> dict[tuple[int, ...], Tensor | slice]:
        return {}

    def _rows(self, slots: tuple[int, ...], device: torch.device) -> Tensor | slice:
        """Once a step, not once a layer."""
        if self.rows_S is not None:
            return self.rows_S
        if slots not in self._known:
            first, stop = slots[0], slots[0] + len(slots)
            follow = slots == tuple(range(first, stop))
            self._known[slots] = slice(first, stop) if follow else upload(slots, device)
        return self._known[slots]


class StateLayout:
    """The recurrent states of one layer: tensors of any shapes and dtypes for each slot."""

    def __init__(self, slots: int, states: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device | str):
        self.states = [_allocate((slots, *shape), dtype, device) for shape, dtype in states]

    def read(self, slots: StateSlots) -> list[Tensor]:
        """The states of some sequences, [S, ...] each; zeros where fresh. They may be the slots themselves: not to be
        changed, nor read after the next `write`."""
        device = self.states[0].device
        rows, fresh_S = slots.rows_in(device), slots.fresh_on(device)
        read = [take_rows(state, rows) for state in self.states]
        if fresh_S is None:
            return read
        return [state.masked_fill(fresh_S.view(-1, *(1,) * (state.dim() - 1)), 0) for state in read]

    def write(self, slots: StateSlots, states: Sequence[Tensor]) -> None:
        """Store states, [S, ...] each, of some sequences."""
        rows = slots.rows_out(self.states[0].device)
        for stored, state in zip(self.states, states, strict=True):
            stored[rows] = state.to(stored.dtype)


@dataclass(frozen=True)
class BlockCache:
    """The cache of one block of one layer; what its mixer does not use is None."""

    keys: PagedLayout | None = None
    values: PagedLayout | None = None
    latent: PagedLayout | None = None
    index: PagedLayout | None = None
    state: StateLayout | None = None

    @property
    def paged(self) -> list[PagedLayout]:
        """All its paged layouts."""
        return [part for part in (self.keys, self.values, self.latent, self.index) if part is not None]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory for a number of pages or slots, of which only the null one (number 0) is set, to zeros: what nobody has
    written is never read, and memory that is not touched costs nothing."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    memory[:1] = 0
    return memory
