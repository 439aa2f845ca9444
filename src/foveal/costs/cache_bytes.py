"""What a sequence keeps in memory: keys and values, latents, index keys, recurrent states."""

import math
from dataclasses import dataclass
from typing import Literal

from foveal.config.formats import ITEM_BYTES, PAGE_SIZE, SNAPSHOTS_EACH, index_key_bytes, latent_bytes
from foveal.config.model import BlockConfig, GQAConfig, MLAConfig, ModelConfig, RecurrentConfig

CachePart = Literal["keys_values", "latents", "index_keys"]
LATENT_DTYPES = ("auto", "bf16", "fp8")
INDEX_DTYPES = ("auto", "bf16", "fp8", "int8", "float32")
_STATE_BYTES = 4  # recurrent states are kept in float32


@dataclass(frozen=True)
class CacheDtypes:
    """How caches are stored, by the names of `ITEM_BYTES`, or fp8: the record formats with scales."""

    keys_values: str
    latents: str
    index_keys: str


@dataclass(frozen=True)
class CacheRow:
    """What one block keeps of each token."""

    part: CachePart
    bytes_per_token: int
    elements_per_token: int
    """Numbers, without scales."""
    window: int | None
    """Only so many tokens are ever read again; None: all."""
    sinks: int = 0
    """Besides, so many of the first."""


@dataclass(frozen=True)
class CacheCost:
    """The caches of a whole model."""

    rows: tuple[CacheRow, ...]
    state_bytes: int
    """Recurrent states of one sequence, whatever its length."""
    page_tokens: int = PAGE_SIZE

    @property
    def bytes_per_token(self) -> int:
        """All layers' records of one token."""
        return sum(row.bytes_per_token for row in self.rows)

    def part_bytes_per_token(self) -> dict[CachePart, int]:
        """The same by part."""
        parts: dict[CachePart, int] = {}
        for row in self.rows:
            parts[row.part] = parts.get(row.part, 0) + row.bytes_per_token
        return parts

    @property
    def page_bytes(self) -> int:
        """All layers' records of one page."""
        return self.page_tokens * self.bytes_per_token

    @property
    def window(self) -> int | None:
        """The widest window, where every layer that keeps rows has one: pages behind it are given back."""
        windows = [row.window for row in self.rows]
        known = [window for window in windows if window is not None]
        return max(known) if known and len(known) == len(windows) else None

    @property
    def sinks(self) -> int:
        """The first tokens that some layer reads for ever: their pages stay."""
        return max((row.sinks for row in self.rows), default=0)

    def sequence_pages(self, tokens: int) -> int:
        """Pages that a sequence of so many computed tokens holds: ceil(n / page), less those that lie wholly behind the
        window of the next query, max(0, n - window + 1) // page, and hold no sinks."""
        if not self.rows:
            return 0
        passed = 0 if self.window is None else max(0, tokens - self.window + 1) // self.page_tokens
        return -(-tokens // self.page_tokens) - max(0, passed - -(-self.sinks // self.page_tokens))

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of so many tokens holds, pages being whole."""
        return self.sequence_pages(tokens) * self.page_bytes + self.state_bytes

    def needed_bytes(self, tokens: int) -> int:
        """Bytes that a query after so many tokens can still read: no page half empty, every window for itself."""
        seen = (row.bytes_per_token * min(tokens, row.sinks + (row.window or tokens)) for row in self.rows)
        return sum(seen) + self.state_bytes

    @property
    def snapshot_bytes(self) -> int:
        """Snapshots of recurrent states, for prefixes, that the engine makes room for beside each sequence's own."""
        return SNAPSHOTS_EACH * self.state_bytes

    def engine_bytes(self, sequences: int, tokens: int, step: int = 2048) -> int:
        """What the engine allocates for so many sequences of so many tokens, computed at most `step` at a time, where
        there is memory for all of it: pages, states and snapshots, and the null page and the null slot. Behind a window
        that is pages for sinks, window and step, and one on either side."""
        most = -(-tokens // self.page_tokens)
        if self.window is not None:
            most = min(most, -(-self.sinks // self.page_tokens) + (self.window + step) // self.page_tokens + 2)
        pages = 1 + sequences * most
        return pages * self.page_bytes + sequences * (self.state_bytes + self.snapshot_bytes) + self.state_bytes

    @property
    def expected_waste_tokens(self) -> float:
        """Places of a sequence's last page that hold no token, on average over lengths: (page - 1) / 2."""
        return (self.page_tokens - 1) / 2

    def expected_waste(self, tokens: int) -> float:
        """Share of the pages of sequences of about so many tokens that holds no token: w / (n + w). Behind a window,
        w / (window - 1 + 2 w + the sinks' pages): the first of its pages is half passed, on average."""
        waste, held = self.expected_waste_tokens, tokens + self.expected_waste_tokens
        if self.window is not None:
            sinks = -(-self.sinks // self.page_tokens) * self.page_tokens
            held = min(held, self.window - 1 + 2 * waste + sinks)
        return waste / held


def cache_dtypes(dtype: str, kv_cache_dtype: str = "auto", index_dtype: str = "auto") -> CacheDtypes:
    """What `auto` means: per-head keys, values and latents in the model's dtype, index keys in fp8 unless the model
    runs in float32. `kv_cache_dtype` is the latents'. ValueError for a dtype that is not known."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype!r} is not known (only {', '.join(ITEM_BYTES)})")
    if kv_cache_dtype not in LATENT_DTYPES:
        raise ValueError(f"kv_cache_dtype must be one of {', '.join(LATENT_DTYPES)}, not {kv_cache_dtype!r}")
    if index_dtype not in INDEX_DTYPES:
        raise ValueError(f"index_dtype must be one of {', '.join(INDEX_DTYPES)}, not {index_dtype!r}")
    automatic = dtype if ITEM_BYTES[dtype] >= 4 else "fp8"
    names = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8", "float32": "float32"}
    return CacheDtypes(dtype, names.get(kv_cache_dtype, dtype), names.get(index_dtype, automatic))


def cache_cost(config: ModelConfig, dtypes: CacheDtypes, page_tokens: int = PAGE_SIZE) -> CacheCost:
    """What the model's caches cost. Raises ValueError where index keys cannot be kept as asked."""
    rows = tuple(row for block in config.blocks for row in block_rows(block, dtypes))
    states = sum(state_bytes(block, dtypes.keys_values) for block in config.blocks)
    return CacheCost(rows, states, page_tokens)


def block_rows(block: BlockConfig, dtypes: CacheDtypes) -> list[CacheRow]:
    """What a block keeps of each token.

    Per-head keys and values: 2 G P numbers (MHA: G = H; MQA: G = 1). MLA: C + R numbers, or the fp8 record of
    C + 4 ceil(C / 128) + 2 R bytes (656 for DeepSeek-V3; FlashMLA README). Index keys: J numbers, or J + 4 bytes (132
    for DeepSeek-V3.2: the scale is a float32).
    """
    mixer, rows = block.operation, []
    if isinstance(mixer, GQAConfig):
        numbers = 2 * mixer.kv_heads * mixer.head_dim
        rows.append(
            CacheRow("keys_values", numbers * ITEM_BYTES[dtypes.keys_values], numbers, mixer.window, mixer.sinks)
        )
    elif isinstance(mixer, MLAConfig):
        size = latent_bytes(mixer.kv_lora_rank, mixer.rope_dim, dtypes.latents)
        rows.append(CacheRow("latents", size, mixer.kv_lora_rank + mixer.rope_dim, None))
    if block.indexer:
        size = index_key_bytes(block.indexer.head_dim, dtypes.index_keys)
        rows.append(CacheRow("index_keys", size, block.indexer.head_dim, None))
    return rows


def state_bytes(block: BlockConfig, dtype: str) -> int:
    """Bytes of one sequence's recurrent state, constant in the context.

    The last W - 1 inputs of the convolutions, in the model's dtype, and a float32 state. S4D: no inputs, 2 X Y numbers
    of state. Mamba-1: X and X Y. Mamba-2: X + 2 G Y and X Y. KDA: 3 H P and H P^2. Gated delta rule: 2 G P + H V and
    H P V.
    """
    mixer = block.operation
    if not isinstance(mixer, RecurrentConfig):
        return 0
    return math.prod(mixer.inputs_shape) * ITEM_BYTES[dtype] + math.prod(mixer.state_shape) * _STATE_BYTES
