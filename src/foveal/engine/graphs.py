"""Decode steps as CUDA graphs: the device is told once what a step does, and then only to do it again.

A graph is for so many sequences of at most so many pages: fewer sequences are filled up with rows that begin on the
null page, which nobody reads, and whatever depends on a context's length is read on the device (`Batch.bounded`). What
a step has to know lies in tensors of the graph's own, filled before each replay.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal.cache.layouts import StateSlots
from foveal.config.formats import PAGE_SIZE
from foveal.kernels.keys import LengthsUnknownError
from foveal.kernels.transfer import staged
from foveal.nn.batch import Batch

_logger = logging.getLogger(__name__)

Work = Callable[[], Tensor]
Capture = Callable[[Work], Work]
"""From a function to one that does the same work on the same tensors again, returning the same tensor."""

# Larger steps gain little, and some operations of theirs group tokens by numbers that the host waits for.
_MOST_SEQUENCES = 256
# Pages of the shortest contexts that have graphs of their own; the next are four times as long.
_LEAST_PAGES = 32
_PAGES_STEP = 4


@dataclass(frozen=True)
class DecodeRow:
    """The next token of a sequence that has some already."""

    token: int
    position: int
    prompt_length: int
    table: Sequence[int]
    slot: int
    """0: no layer is recurrent."""


@dataclass(frozen=True)
class GraphLimits:
    """What graphs are made for: sequences at a time, pages of one, pages of the shortest bound."""

    sequences: int
    pages: int
    least_pages: int = _LEAST_PAGES


class DecodeGraphs:
    """Graphs of one model and its cache, each captured when it is first needed."""

    def __init__(
        self, step: Callable[[Batch], Tensor], limits: GraphLimits, device: torch.device | str, capture: Capture
    ) -> None:
        """step: the logits of all tokens of a batch, which may be `bounded`."""
        self._step, self._limits, self._device, self._capture = step, limits, device, capture
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._possible = True

    def run(self, rows: Sequence[DecodeRow]) -> Tensor | None:
        """Logits [S, V] of one token for each sequence, valid until the next run. None where there are too many of
        them, or this model has an operation that must know the contexts' lengths on the host."""
        if len(rows) > _MOST_SEQUENCES:
            return None
        size = self._size(len(rows), max(len(row.table) for row in rows))
        if self._possible and size not in self._graphs:
            try:
                self._graphs[size] = _Graph(self._step, size, self._device, self._capture)
            except LengthsUnknownError as error:
                _logger.info("decode steps of this model are no CUDA graphs: %s", error)
                self._possible = False
        return self._graphs[size].run(rows) if self._possible else None

    def _size(self, sequences: int, pages: int) -> tuple[int, int]:
        """The size of the graph that serves them: a power of two of sequences, a bound on the pages of each."""
        bound = self._limits.least_pages
        while bound < pages:
            bound *= _PAGES_STEP
        most = 1 << (sequences - 1).bit_length()
        return min(most, self._limits.sequences), min(bound, self._limits.pages)


class _Graph:
    """One graph and the tensors that it reads."""

    def __init__(
        self, step: Callable[[Batch], Tensor], size: tuple[int, int], device: torch.device | str, capture: Capture
    ) -> None:
        sequences, pages = size
        self._device = device
        # Zeros are rows of no sequence: token 0 at position 0 of the null page. So what runs while capturing, does no
        # harm.
        self._numbers_XS = torch.zeros(4, sequences, dtype=torch.int64, device=device)
        self._table_SB = torch.zeros(sequences, pages, dtype=torch.int64, device=device)
        self._tables: list[list[int]] = [[0]] * sequences
        token_S, position_S, prompt_S, slot_S = self._numbers_XS
        batch = Batch(
            ids_T=token_S,
            positions_T=position_S,
            q_offsets=tuple(range(sequences + 1)),
            k_lengths=(pages * PAGE_SIZE,) * sequences,
            table_SB=self._table_SB,
            slots=StateSlots((), (), (), slot_S),
            prompts_T=prompt_S,
            bounded=True,
        )
        # A batch of its own each time: what it keeps from one run is not of the next.
        self._replay = capture(lambda: step(replace(batch)))

    def run(self, rows: Sequence[DecodeRow]) -> Tensor:
        """See `DecodeGraphs.run`."""
        self._fill(rows)
        return self._replay()[: len(rows)]

    def _fill(self, rows: Sequence[DecodeRow]) -> None:
        padding = len(self._tables) - len(rows)
        numbers = [(row.token, row.position, row.prompt_length, row.slot) for row in rows] + [(0, 0, 0, 0)] * padding
        numbers_XS = torch.tensor(numbers, dtype=torch.int64).T.contiguous()
        self._numbers_XS.copy_(staged(numbers_XS, self._device), non_blocking=True)
        for place, table in enumerate([*(row.table for row in rows), *([0] for _ in range(padding))]):
            # A sequence gets a page in one step of 64.
            if table != self._tables[place]:
                self._tables[place] = list(table)
                pages_B = staged(torch.tensor(self._tables[place], dtype=torch.int64), self._device)
                self._table_SB[place, : len(pages_B)].copy_(pages_B, non_blocking=True)


class CudaCapture:
    """`Capture` by torch.cuda.CUDAGraph, all graphs in one memory pool: they run one at a time, and what one returned
    is used before the next runs."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()  # compiles kernels, and makes what is made only once
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
