"""A sequence through a model, chunk by chunk through a paged cache: what is measured never lies in memory whole."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foveal.cache import PAGE_SIZE
from foveal.cache.layouts import StateSlots
from foveal.cache.store import CacheStore, plan_cache
from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.nn.watch import Watch

# Tokens computed at a time: enough for the matrix products, few beside a long context.
CHUNK = 512


class Prefill:
    """One cache for sequences of at most `length` tokens, one at a time.

    `kv_cache_dtype` is the latents', as of `LLM`; index keys are stored as the decoder says. `dense`: sparse layers
    attend to everything (`Batch.dense`). Raises ValueError where the
    model has fewer positions, or no use for the dtype.
    """

    def __init__(
        self, decoder: Decoder, length: int, *, kv_cache_dtype: str = "auto", dense: bool = False, chunk: int = CHUNK
    ) -> None:
        config, options = decoder.config, decoder.options
        if length > config.max_positions:
            raise ValueError(f"{length} tokens are more than the model's {config.max_positions} positions")
        if chunk < 1:
            raise ValueError(f"a chunk must be at least one token, not {chunk}")
        plan = plan_cache(config, options.dtype, kv_cache_dtype, options.index_dtype)
        self.decoder, self._length, self._chunk = decoder, length, chunk
        self._dense = dense
        self._device = decoder.embed_tokens.weight.device
        # Pages that follow one another are read in place. Page 0 and slot 0 are null.
        self._pages = list(range(1, 1 + -(-length // PAGE_SIZE)))
        self._slot = 1 if plan.has_slots else None
        self._store = CacheStore(plan, 1 + len(self._pages), 2 if plan.has_slots else 0, self._device)

    @torch.no_grad()
    def run(self, ids: Sequence[int], first: int = 0, watch: Watch | None = None) -> Iterator[tuple[range, Tensor]]:
        """What `Decoder.trunk` gives for the positions from `first` on: for each chunk which positions, and their rows
        [L, D]. `watch` sees every chunk."""
        assert 0 < len(ids) <= self._length, (len(ids), self._length)
        for start in range(0, len(ids), self._chunk):
            stop = min(start + self._chunk, len(ids))
            x_TD, _ = self.decoder.trunk(self._batch(ids, start, stop), self._store, watch)
            wanted = range(max(start, first), stop)
            if wanted:
                yield wanted, x_TD[wanted.start - start :]

    def _batch(self, ids: Sequence[int], start: int, stop: int) -> Batch:
        slots = None
        if self._slot is not None:
            slots = StateSlots((self._slot,), (self._slot,), (start == 0,))
        batch = Batch.paged(
            [ids[start:stop]], [start], [self._pages], slots=slots, rope_lengths=[len(ids)], device=self._device
        )
        return replace(batch, dense=self._dense)
