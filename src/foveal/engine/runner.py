"""Runs one step of the model on what the scheduler planned."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from foveal.cache import CacheManager, Copies
from foveal.engine.scheduler import Chunk
from foveal.nn.batch import Batch, StateSlots


class StepOutput(Protocol):
    """What a model's step gives."""

    @property
    def logits_LV(self) -> Tensor:
        """One row for each that the batch wanted."""


class Model(Protocol):
    """What the engine needs of a model: `foveal.models.Decoder`, or a double in tests."""

    def step(self, batch: Batch, cache: Any) -> StepOutput:
        """Compute the batch's tokens, reading and writing the cache."""


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


class Runner:
    """A model, its cache tensors and the manager that says which pages are whose."""

    def __init__(
        self,
        model: Model,
        store: Store,
        manager: CacheManager,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model = model
        self._store = store
        self._manager = manager
        self._device = device

    @torch.inference_mode()
    def run(self, plan: Sequence[Chunk]) -> StepLogits:
        """Compute the plan's tokens; the logits that are needed to go on."""
        counts = [wanted_rows(chunk) for chunk in plan]
        output = self._model.step(self._batch(plan, counts), self._store)
        rows = [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]
        return StepLogits(output.logits_LV, rows)

    @torch.inference_mode()
    def copy(self, copies: Copies) -> None:
        """Copy what a fork does not share."""
        if copies.pages:
            self._store.copy_pages(copies.pages)
        if copies.slots:
            self._store.copy_slots(copies.slots)

    def _batch(self, plan: Sequence[Chunk], counts: Sequence[int]) -> Batch:
        ends = accumulate(chunk.count for chunk in plan)
        wanted = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
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


def wanted_rows(chunk: Chunk) -> int:
    """How many of the chunk's last tokens need logits: the last, where a token is to be chosen after it, and those of
    the prompt whose log probabilities were asked for and are not known yet."""
    first = chunk.sequence.request.next_prompt_row
    if first is not None:
        return max(0, chunk.end - max(chunk.start, first))
    return int(chunk.caught_up)
