"""All layers' caches: what a page and a slot cost, and the tensors behind them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from foveal.cache.layouts import BlockCache, IndexKeyLayout, LatentLayout, PagedLayout, PlainLayout, StateLayout
from foveal.config import ModelConfig
from foveal.config.formats import PAGE_SIZE, index_key_bytes, latent_bytes
from foveal.config.model import BlockConfig, GQAConfig, IndexerConfig, MLAConfig, RecurrentConfig

KV_CACHE_DTYPES = {"auto": None, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp8": "fp8"}
INDEX_DTYPES = KV_CACHE_DTYPES | {"int8": "int8", "float32": torch.float32, "fp32": torch.float32}

StoredDtype = torch.dtype | str
"""A torch dtype, or "fp8" or (index keys) "int8": the record formats with scales."""


@dataclass(frozen=True)
class CachePlan:
    """What the model's caches hold, and their sizes in bytes."""

    config: ModelConfig
    dtype: torch.dtype
    latent_dtype: StoredDtype
    index_dtype: StoredDtype
    page_bytes: int
    """All layers' rows of 64 tokens."""
    slot_bytes: int
    """All layers' recurrent states of one sequence."""
    window: int | None
    """The widest attention window, where every attention layer has one: pages behind it are given back."""
    sinks: int
    """The first tokens that some layer sees for ever: their pages stay."""

    @property
    def has_pages(self) -> bool:
        """Some layer keeps something for each token."""
        return self.page_bytes > 0

    @property
    def has_slots(self) -> bool:
        """Some layer keeps a recurrent state."""
        return self.slot_bytes > 0


def resolve_index_dtype(index_dtype: str, dtype: torch.dtype) -> StoredDtype:
    """`auto`: unquantised in float32 models, fp8 otherwise. ValueError for a name that is not known."""
    if index_dtype not in INDEX_DTYPES:
        raise ValueError(f"index_dtype must be one of {', '.join(INDEX_DTYPES)}, not {index_dtype!r}")
    return INDEX_DTYPES[index_dtype] or (dtype if dtype in (torch.float32, torch.float64) else "fp8")


def plan_cache(
    config: ModelConfig, dtype: torch.dtype, kv_cache_dtype: str = "auto", index_dtype: str = "auto"
) -> CachePlan:
    """Sizes of a page and a slot. `kv_cache_dtype` is the latents': `auto` keeps them in the model's dtype.

    Raises ValueError for a dtype that is not known, or that the model has no use for.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not {kv_cache_dtype!r}")
    mixers = [block.operation for block in config.blocks]
    if kv_cache_dtype != "auto" and not any(isinstance(mixer, MLAConfig) for mixer in mixers):
        raise ValueError(f"kv_cache_dtype {kv_cache_dtype!r} is for latents, which {config.family} does not have")
    latent_dtype = KV_CACHE_DTYPES[kv_cache_dtype] or dtype
    stored_index = resolve_index_dtype(index_dtype, dtype)
    heads = [mixer for mixer in mixers if isinstance(mixer, GQAConfig)]
    windows = [mixer.window for mixer in heads]
    windowed = windows and None not in windows and not any(isinstance(mixer, MLAConfig) for mixer in mixers)
    token_bytes = sum(_token_bytes(block, dtype, latent_dtype, stored_index) for block in config.blocks)
    return CachePlan(
        config=config,
        dtype=dtype,
        latent_dtype=latent_dtype,
        index_dtype=stored_index,
        page_bytes=PAGE_SIZE * token_bytes,
        slot_bytes=sum(_slot_bytes(block, dtype) for block in config.blocks),
        window=max(window for window in windows if window) if windowed else None,
        sinks=max((mixer.sinks for mixer in heads), default=0),
    )


class CacheStore:
    """The tensors of all layers' caches for so many pages and slots, the null page and the null slot included."""

    def __init__(self, plan: CachePlan, pages: int, slots: int, device: torch.device | str = "cpu") -> None:
        self.plan, self.page_count, self.slot_count = plan, pages, slots
        self._device = device
        self.layers: list[list[BlockCache | None]] = [
            [self._block(block) for block in layer] for layer in plan.config.layers
        ]

    def copy_pages(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination) in every layer."""
        for source, destination in pairs:
            for layout in self._paged():
                layout.pages[destination] = layout.pages[source]

    def copy_slots(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy recurrent states (source, destination) in every layer."""
        for source, destination in pairs:
            for block in self._blocks():
                for state in block.state.states if block.state else ():
                    state[destination] = state[source]

    def _blocks(self) -> list[BlockCache]:
        return [block for layer in self.layers for block in layer if block is not None]

    def _paged(self) -> list[PagedLayout]:
        return [layout for block in self._blocks() for layout in block.paged]

    def _block(self, block: BlockConfig) -> BlockCache | None:
        mixer = block.operation
        index = self._index(block.indexer) if block.indexer else None
        if isinstance(mixer, GQAConfig):
            row, dtype = (mixer.kv_heads, mixer.head_dim), self.plan.dtype
            return BlockCache(keys=self._plain(row, dtype), values=self._plain(row, dtype), index=index)
        if isinstance(mixer, MLAConfig):
            return BlockCache(latent=self._latent(mixer), index=index)
        if isinstance(mixer, RecurrentConfig):
            return BlockCache(state=StateLayout(self.slot_count, _states(mixer, self.plan.dtype), self._device))
        return None

    def _plain(self, row: tuple[int, ...], dtype: torch.dtype) -> PlainLayout:
        return PlainLayout(self.page_count, row, dtype, self._device)

    def _latent(self, mixer: MLAConfig) -> PagedLayout:
        dtype = self.plan.latent_dtype
        if isinstance(dtype, torch.dtype):
            row = (mixer.kv_lora_rank + mixer.rope_dim,)
            return PlainLayout(self.page_count, row, dtype, self._device, read_as=self.plan.dtype)
        return LatentLayout(self.page_count, mixer.kv_lora_rank, mixer.rope_dim, self.plan.dtype, self._device)

    def _index(self, indexer: IndexerConfig) -> PagedLayout:
        dtype = self.plan.index_dtype
        if isinstance(dtype, torch.dtype):
            return self._plain((indexer.head_dim,), dtype)
        return IndexKeyLayout(self.page_count, indexer.head_dim, dtype, self._device)


def _token_bytes(block: BlockConfig, dtype: torch.dtype, latent: StoredDtype, index: StoredDtype) -> int:
    mixer, total = block.operation, 0
    if isinstance(mixer, GQAConfig):
        total = 2 * mixer.kv_heads * mixer.head_dim * dtype.itemsize
    elif isinstance(mixer, MLAConfig):
        total = latent_bytes(mixer.kv_lora_rank, mixer.rope_dim, _name(latent))
    if block.indexer:
        total += index_key_bytes(block.indexer.head_dim, _name(index))
    return total


def _slot_bytes(block: BlockConfig, dtype: torch.dtype) -> int:
    if not isinstance(block.operation, RecurrentConfig):
        return 0
    states = _states(block.operation, dtype)
    return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in states)


def _states(mixer: RecurrentConfig, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(mixer.inputs_shape, dtype), (mixer.state_shape, torch.float32)]


def _name(dtype: StoredDtype) -> str:
    return dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
