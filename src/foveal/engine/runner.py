"""Runs one step of the model on what the scheduler planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from foveal.cache import CacheManager
from foveal.cache.layouts import StateSlots
from foveal.engine.graphs import DecodeGraphs, DecodeRow
from foveal.engine.look import Recorder, TokenSelection
from foveal.engine.scheduler import Chunk
from foveal.nn.batch import Batch
from foveal.nn.watch import Watch


class StepOutput(Protocol):
    """What a model's step gives."""

    @property
    def logits_LV(self) -> Tensor:
        """One row for each that the batch wanted."""

    @property
    def collected(self) -> Mapping[str, list[Any]]:
        """What the batch asked to collect, by layer."""


class Model(Protocol):
    """What the engine needs of a model: `foveal.models.Decoder`, or a double in tests."""

    def step(self, batch: Batch, cache: Any, watch: Watch | None = None) -> StepOutput:
        """Compute the batch's tokens, reading and writing the cache; `watch` is shown every block with an indexer."""


class Store(Protocol):
    """What the engine needs of the cache's tensors: `foveal.cache.store.CacheStore`, or a double in tests."""

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination), in every layer."""

    def copy_slots(self, pairs: list[tuple[int, int]]) -> None:
        """Copy states, (source, destination), in every layer."""


@dataclass(frozen=True)
class StepLogits:
    """The logits of a step, [L, V] as the model gives them, and which rows belong to each chunk of the plan: one for
    each of its last tokens, as many as `wanted_rows` says."""

    logits_LV: Tensor
    rows: list[range]
    selections: dict[int, TokenSelection] = field(default_factory=dict)
    """By row of the logits, for requests that asked."""


class Runner:
    """A model, its cache tensors and the manager that says which pages are whose."""

    def __init__(
        self,
        model: Model,
        store: Store,
        manager: CacheManager,
        *,
        device: torch.device | str = "cpu",
        sparse: Sequence[bool] = (),
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`sparse`: for each sparse layer of the model, whether it has an indexer of its own. `graphs`: what decode
        steps may run as."""
        self._graphs = graphs
        self._sparse = tuple(sparse)
        self._model = model
        self._store = store
        self._manager = manager
        self._device = device

    @torch.inference_mode()
    def run(self, plan: Sequence[Chunk]) -> StepLogits:
        """Compute the plan's tokens; the logits that are needed to go on."""
        self._copy()
        counts = [wanted_rows(chunk) for chunk in plan]
        rows = [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]
        if (logits_LV := self._replayed(plan, counts)) is not None:
            return StepLogits(logits_LV, rows)
        looked_at = {end - 1: place for place, end in enumerate(_ends(plan)) if _wants_look(plan[place])}
        if not looked_at:
            return StepLogits(self._model.step(self._batch(plan, counts), self._store).logits_LV, rows)
        batch = replace(self._batch(plan, counts), collect=frozenset({"selection"}))
        recorder = Recorder(self._sparse, {row: plan[place].end for row, place in looked_at.items()})
        output = self._model.step(batch, self._store, recorder.watch)
        found = recorder.selections(output.collected)
        return StepLogits(output.logits_LV, rows, {rows[looked_at[row]][-1]: one for row, one in found.items()})

    def _replayed(self, plan: Sequence[Chunk], counts: Sequence[int]) -> Tensor | None:
        """The logits by a CUDA graph, where there are graphs and each sequence gets one token after others."""
        if self._graphs is None or counts != [1] * len(plan):
            return None
        if any(chunk.count > 1 or chunk.start == 0 or _wants_look(chunk) for chunk in plan):
            return None
        return self._graphs.run([self._row(chunk) for chunk in plan])

    def _row(self, chunk: Chunk) -> DecodeRow:
        sequence = chunk.sequence
        return DecodeRow(
            token=sequence.tokens[chunk.start],
            position=chunk.start,
            prompt_length=sequence.request.prompt_length,
            table=self._manager.table(sequence.key),
            slot=self._manager.slot(sequence.key) or 0,
        )

    def _copy(self) -> None:
        """One after another: those that a failure leaves undone are done before the next step."""
        copies = self._manager.take_copies()
        try:
            for pairs, copy in ((copies.pages, self._store.copy_pages), (copies.slots, self._store.copy_slots)):
                while pairs:
                    copy(pairs[:1])
                    del pairs[0]
        finally:
            self._manager.give_back(copies)

    def _batch(self, plan: Sequence[Chunk], counts: Sequence[int]) -> Batch:
        wanted = [row for end, count in zip(_ends(plan), counts, strict=True) for row in range(end - count, end)]
        return Batch.paged(
            [chunk.sequence.tokens[chunk.start : chunk.end] for chunk in plan],
            [chunk.start for chunk in plan],
            [self._manager.table(chunk.sequence.key) for chunk in plan],
            slots=self._state_slots(plan),
            rope_lengths=[chunk.sequence.request.prompt_length for chunk in plan],
            # Mid-prompt nobody needs logits; one row all the same, so that no operation has to cope with none.
            wanted=wanted or [0],
            device=self._device,
        )

    def _state_slots(self, plan: Sequence[Chunk]) -> StateSlots | None:
        slots = tuple(slot for chunk in plan if (slot := self._manager.slot(chunk.sequence.key)) is not None)
        if not slots:
            return None
        assert len(slots) == len(plan)
        return StateSlots(slots, slots, tuple(chunk.start == 0 for chunk in plan))


def _ends(plan: Sequence[Chunk]) -> list[int]:
    """The batch row after each chunk's last."""
    return list(accumulate(chunk.count for chunk in plan))


def _wants_look(chunk: Chunk) -> bool:
    return chunk.caught_up and chunk.sequence.params.selection


def wanted_rows(chunk: Chunk) -> int:
    """How many of the chunk's last tokens need logits: the last, where a token is to be chosen after it, and those of
    the prompt whose log probabilities were asked for and are not known yet."""
    first = chunk.sequence.request.next_prompt_row
    if first is not None:
        return max(0, chunk.end - max(chunk.start, first))
    return int(chunk.caught_up)
