"""One forward, packed: `Batch` says which tokens of which sequences are computed and where their keys are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from foveal.cache.layouts import StateSlots
from foveal.config.formats import PAGE_SIZE
from foveal.kernels import Contexts, Queries
from foveal.kernels.transfer import send, upload


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
    """Keys of each sequence once this step's are written; `bounded`: at most so many."""
    table_SB: Tensor | None = None
    """int64 page ids, 0-padded. None: no cache, the keys are this batch's own."""
    slots: StateSlots | None = None
    rope_lengths: tuple[int, ...] | None = None
    """For `dynamic` rope: the prompt length of each sequence (None: k_lengths)."""
    prompts_T: Tensor | None = None
    """The same as int64 [T] on the device; None: it is made of `rope_lengths` where it is needed."""
    bounded: bool = False
    """One new token of each sequence, and how long contexts are says `positions_T` alone: what the host computes holds
    for all lengths up to `k_lengths` (CUDA graphs)."""
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
        ids: Tensor | Sequence[Tensor],
        *,
        collect: frozenset[str] = frozenset(),
        dense: bool = False,
        device: torch.device | str | None = None,
    ) -> "Batch":
        """Whole sequences without a cache: int64 [S, N], or a list of int64 [N]. `device`: where they are sent, from
        the CPU, without waiting; None: they stay where they are."""
        sequences = list(ids)
        lengths = tuple(len(sequence) for sequence in sequences)
        positions = [torch.arange(length, device=sequences[0].device) for length in lengths]
        offsets = tuple(accumulate(lengths, initial=0))
        ids_T, positions_T = (
            whole if device is None else send(whole, device) for whole in (torch.cat(sequences), torch.cat(positions))
        )
        return Batch(ids_T, positions_T, offsets, lengths, collect=collect, dense=dense)

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
            ids_T=upload(ids, device),
            positions_T=upload(positions, device),
            q_offsets=tuple(accumulate(lengths, initial=0)),
            k_lengths=tuple(start + length for start, length in zip(starts, lengths, strict=True)),
            table_SB=send(torch.tensor(padded, dtype=torch.int64), device),
            slots=slots,
            rope_lengths=None if rope_lengths is None else tuple(rope_lengths),
            wanted_L=None if wanted is None else upload(wanted, device),
            collect=collect,
        )

    @cached_property
    def queries(self) -> Queries:
        """Each sequence's new tokens: the last of its keys."""
        if self.bounded:
            offsets = torch.arange(len(self.q_offsets), device=self.positions_T.device)
            last = tuple(length - 1 for length in self.k_lengths)
            return Queries(self.q_offsets, last, torch.cat((offsets, self.positions_T)))
        lengths = (stop - start for start, stop in pairwise(self.q_offsets))
        return Queries(self.q_offsets, tuple(keys - new for keys, new in zip(self.k_lengths, lengths, strict=True)))

    @property
    def contexts(self) -> Contexts:
        """Where each sequence's keys are stored."""
        if self.gathered is not None:
            return Contexts(self.k_lengths, self.gathered.starts)
        if self.table_SB is None:
            return Contexts.packed(self.k_lengths)
        if self.bounded:
            none = (-1,) * len(self.k_lengths)
            actual = torch.cat((self.positions_T + 1, torch.full_like(self.positions_T, -1)))
            return Contexts(self.k_lengths, none, self.table_SB, actual)
        return Contexts.paged(self.table_SB, self.k_lengths)

    @property
    def rows_T(self) -> Tensor:
        """int64 [T]: the cache row that each new token's keys go to."""
        assert self.table_SB is not None
        sequence_T = self.queries.sequence_on(self.table_SB.device).long()
        pages_T = self.table_SB[sequence_T, self.positions_T // PAGE_SIZE]
        return pages_T * PAGE_SIZE + self.positions_T % PAGE_SIZE
