"""One forward, packed: `Batch` says which tokens of which sequences are computed and where their keys are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels import Contexts, Queries


@dataclass(frozen=True)
class StateSlots:
    """Where recurrent layers find and leave each sequence's state."""

    slots_in: tuple[int, ...]
    slots_out: tuple[int, ...]
    fresh: tuple[bool, ...]
    """True: the sequence starts here, from a zero state; slots_in is not read."""


@dataclass(frozen=True)
class Gathered:
    """Keys of this batch that other processes compute."""

    gather: Callable[[Tensor], Tensor]
    """From [T, ...], something of each of this batch's tokens, to the same of the tokens of all processes, in the order
    of their sequences; differentiable."""
    starts: tuple[int, ...]
    """First of the gathered rows of each sequence."""


@dataclass(frozen=True)
class Batch:
    """All tokens of all sequences of one forward, one after another, with no padding."""

    ids_T: Tensor
    """int64 [T]."""
    positions_T: Tensor
    """int64 [T]."""
    q_offsets: tuple[int, ...]
    """S + 1 numbers: sequence s owns rows q_offsets[s] to q_offsets[s + 1]."""
    k_lengths: tuple[int, ...]
    """Keys of each sequence once this step's are written."""
    table_SB: Tensor | None = None
    """int64 page ids, 0-padded. None: no cache, the keys are this batch's own."""
    slots: StateSlots | None = None
    rope_lengths: tuple[int, ...] | None = None
    """For `dynamic` rope: the prompt length of each sequence (None: k_lengths)."""
    wanted_L: Tensor | None = None
    """int64 rows whose logits are wanted. None: all."""
    collect: frozenset[str] = frozenset()
    """What the caller wants to see besides the logits: "selection", "experts", "router"."""
    dense: bool = False
    """Sparse layers attend to everything; their indexers compute keys, and choose nothing."""
    gathered: Gathered | None = None
    """Without a cache: other processes have tokens of the same sequences. None: all keys are this batch's own."""

    @staticmethod
    def packed(
        ids: Tensor | Sequence[Tensor], *, collect: frozenset[str] = frozenset(), dense: bool = False
    ) -> "Batch":
        """Whole sequences without a cache: int64 [S, N], or a list of int64 [N]."""
        sequences = list(ids)
        lengths = tuple(len(sequence) for sequence in sequences)
        device = sequences[0].device
        positions = [torch.arange(length, device=device) for length in lengths]
        offsets = tuple(accumulate(lengths, initial=0))
        return Batch(torch.cat(sequences), torch.cat(positions), offsets, lengths, collect=collect, dense=dense)

    @staticmethod
    def paged(
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        tables: Sequence[Sequence[int]],
        *,
        slots: StateSlots | None = None,
        rope_lengths: Sequence[int] | None = None,
        wanted: Sequence[int] | None = None,
        collect: frozenset[str] = frozenset(),
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """New tokens of each sequence at positions starts[s], starts[s] + 1, ..., with pages for all keys."""
        lengths = [len(sequence) for sequence in tokens]
        width = max((len(table) for table in tables), default=0)
        padded = [list(table) + [0] * (width - len(table)) for table in tables]
        ids = [token for sequence in tokens for token in sequence]
        positions = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        return Batch(
            ids_T=torch.tensor(ids, dtype=torch.int64, device=device),
            positions_T=torch.tensor(positions, dtype=torch.int64, device=device),
            q_offsets=tuple(accumulate(lengths, initial=0)),
            k_lengths=tuple(start + length for start, length in zip(starts, lengths, strict=True)),
            table_SB=torch.tensor(padded, dtype=torch.int64, device=device),
            slots=slots,
            rope_lengths=None if rope_lengths is None else tuple(rope_lengths),
            wanted_L=None if wanted is None else torch.tensor(wanted, dtype=torch.int64, device=device),
            collect=collect,
        )

    @property
    def queries(self) -> Queries:
        """Each sequence's new tokens: the last of its keys."""
        lengths = (stop - start for start, stop in pairwise(self.q_offsets))
        return Queries(self.q_offsets, tuple(keys - new for keys, new in zip(self.k_lengths, lengths, strict=True)))

    @property
    def contexts(self) -> Contexts:
        """Where each sequence's keys are stored."""
        if self.gathered is not None:
            return Contexts(self.k_lengths, self.gathered.starts)
        if self.table_SB is None:
            return Contexts.packed(self.k_lengths)
        return Contexts.paged(self.table_SB, self.k_lengths)

    @property
    def rows_T(self) -> Tensor:
        """int64 [T]: the cache row that each new token's keys go to."""
        assert self.table_SB is not None
        lengths = torch.tensor([stop - start for start, stop in pairwise(self.q_offsets)])
        sequence_T = torch.repeat_interleave(lengths).to(self.table_SB.device)
        pages_T = self.table_SB[sequence_T, self.positions_T // PAGE_SIZE]
        return pages_T * PAGE_SIZE + self.positions_T % PAGE_SIZE
