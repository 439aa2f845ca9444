"""Record formats of the caches, in bytes a token. General in the dimensions; the figures quoted are DeepSeek-V3's."""

PAGE_SIZE = 64
"""Tokens of a cache page."""

SNAPSHOTS_EACH = 4
"""Snapshots of recurrent states, for prefixes, that the engine makes room for beside each sequence's own state."""

LATENT_BLOCK = 128
"""Latent numbers that share a scale in the fp8 record."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

EIGHT_BITS = ("fp8", "int8")
"""Dtypes of index keys that are rounded to eight bits, with a scale each."""


def latent_bytes(rank: int, rope_dim: int, dtype: str) -> int:
    """One latent with its rope key: plain numbers, or `fp8` = C + 4 ceil(C / 128) + 2 R (656: FlashMLA README)."""
    if dtype == "fp8":
        return rank + 4 * -(-rank // LATENT_BLOCK) + 2 * rope_dim
    return (rank + rope_dim) * ITEM_BYTES[dtype]


def index_key_bytes(head_dim: int, dtype: str) -> int:
    """One index key: plain numbers, or `fp8` and `int8` = J + 4 (132: DeepGEMM `kv_cache_cast_to_fp8`): eight bits each
    and a scale. In a page its 64 keys come first, then their 64 scales.

    Raises ValueError where eight bits are asked for and J is not a power of two: the Hadamard turn needs one.
    """
    if dtype not in EIGHT_BITS:
        return head_dim * ITEM_BYTES[dtype]
    if head_dim & (head_dim - 1):
        raise ValueError(f"{dtype} index keys need an index_head_dim that is a power of two, not {head_dim}")
    return head_dim + 4
