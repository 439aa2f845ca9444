"""What one layer keeps for each token or sequence, behind the page ids and slot numbers of the manager."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE, index_key_bytes, latent_bytes
from foveal.kernels import Rows
from foveal.kernels.keys import Records, take_rows
from foveal.kernels.records import IndexKeyRecords, LatentRecords, RoundedRows


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


class StateLayout:
    """The recurrent states of one layer: tensors of any shapes and dtypes for each slot."""

    def __init__(self, slots: int, states: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device | str):
        self.states = [_allocate((slots, *shape), dtype, device) for shape, dtype in states]

    def read(self, slots: Sequence[int], fresh: Sequence[bool]) -> list[Tensor]:
        """The states in some slots, [S, ...] each; zeros where fresh. They may be the slots themselves: not to be
        changed, nor read after the next `write`."""
        if not any(fresh):
            return [take_rows(state, self._rows(slots)) for state in self.states]
        read = [state[list(slots)] for state in self.states]
        fresh_S = torch.tensor(fresh, device=read[0].device)
        for state in read:
            state[fresh_S] = 0
        return read

    def write(self, slots: Sequence[int], states: Sequence[Tensor]) -> None:
        """Store states, [S, ...] each, in some slots."""
        rows = self._rows(slots)
        for stored, state in zip(self.states, states, strict=True):
            stored[rows] = state.to(stored.dtype)

    def _rows(self, slots: Sequence[int]) -> Tensor | slice:
        """Slots that follow one another are read in place and written in one go."""
        first, stop = slots[0], slots[0] + len(slots)
        if list(slots) == list(range(first, stop)):
            return slice(first, stop)
        return torch.tensor(slots, device=self.states[0].device)


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
