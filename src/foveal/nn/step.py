"""What all layers of one forward share: positions, where keys lie, rope angles, the current selection."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveal.cache.layouts import PagedLayout
from foveal.config.model import RopeConfig
from foveal.kernels import KeySource, Rows
from foveal.kernels.transfer import upload
from foveal.nn.batch import Batch
from foveal.nn.rope import rope_turns
from foveal.nn.watch import Gaze, Glance, Watch

# Up to so many tokens a block runs as one call, if it can; with more, separate calls are no slower.
FUSED_TOKENS = 32


class Step:
    """One forward pass over a batch.

    No dataclass: FSDP searches dataclasses for tensors, and would hand each layer a copy.
    """

    def __init__(self, batch: Batch, watch: Watch | None = None) -> None:
        self.batch, self.queries, self.contexts = batch, batch.queries, batch.contexts
        self.rows_T = None if batch.table_SB is None else batch.rows_T
        """Cache rows of the new tokens; None without a cache."""
        self.selection_TK: Tensor | None = None
        """The selection of the last indexer that ran: int32 positions, ascending, -1 last. None: everything is seen."""
        self.watch = watch
        """Who is shown what each block with an indexer computes from."""
        self.glance: Glance | None = None
        self.gaze: Gaze | None = None
        """The current block's, where there is a watch."""
        self.collected: dict[str, list[Any]] = {}
        self._turns: dict[tuple[RopeConfig, bool, int | None], Tensor] = {}

    def turns(self, rope: RopeConfig, *, exact: bool = False, most: int | None = None) -> Tensor:
        """Every token's turns, complex64 [T, dim / 2], for `apply_rope`; computed once a step.

        exact: see `rope_turns`. most: tokens at later positions are turned as one at this position is.
        """
        # Which dimensions make a pair does not change its turn.
        key = replace(rope, interleaved=False), exact, most
        if key not in self._turns:
            positions_T = self.batch.positions_T if most is None else self.batch.positions_T.clamp_max(most)
            prompts_T = self.prompts_T if rope.scaling.kind == "dynamic" else None
            self._turns[key] = rope_turns(rope, positions_T, prompts_T, exact=exact)
        return self._turns[key]

    def keep(self, layout: PagedLayout | None, values_TX: Tensor) -> KeySource:
        """Store this step's rows in the cache, where there is one, and say where all rows of each sequence are."""
        if layout is None:
            return KeySource(Rows(self.gather(values_TX)), self.contexts)
        assert self.rows_T is not None
        layout.write(self.rows_T, values_TX)
        return KeySource(layout.records, self.contexts)

    def gather(self, values_TX: Tensor) -> Tensor:
        """This step's rows, and those that other processes compute, where keys are shared."""
        return values_TX if self.batch.gathered is None else self.batch.gathered.gather(values_TX)

    @cached_property
    def fusable(self) -> bool:
        """Whether blocks may run as one call: few tokens, a cache, no gradients, nobody who wants to see inside."""
        if self.rows_T is None or len(self.rows_T) > FUSED_TOKENS or torch.is_grad_enabled():
            return False
        return self.watch is None and not self.batch.collect and not self.batch.dense

    def collect(self, name: str, value: Any) -> None:
        """Keep something that the batch's caller asked for."""
        if name in self.batch.collect:
            self.collected.setdefault(name, []).append(value)

    @cached_property
    def prompts_T(self) -> Tensor:
        """int64 [T]: the prompt length of each token's sequence."""
        batch = self.batch
        if batch.prompts_T is not None:
            return batch.prompts_T
        lengths = batch.rope_lengths or batch.k_lengths
        pairs = zip(self.queries.lengths, lengths, strict=True)
        return upload([length for count, length in pairs for _ in range(count)], batch.positions_T.device)
