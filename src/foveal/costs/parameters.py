"""Parameters, and the bytes that weights take."""

from collections.abc import Iterable
from dataclasses import dataclass

from foveal.config.model import Fp8Blocks, ModelConfig
from foveal.costs.weights import PARTS, Part, Weight, model_weights

WEIGHT_DTYPES = ("float32", "bfloat16", "fp8", "int8", "int4")
_RELEASED = {"float32": "float32", "float64": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
_GROUP, _GROUP_BYTES = 32, 20
"""int4: 32 weights of a row in 16 bytes, with a scale and a lowest value in bfloat16."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a part of the model."""

    total: int
    active: int
    """Those that one token's computation uses: of routed experts the chosen ones, of an embedding one row."""


def count_parameters(config: ModelConfig) -> dict[Part, ParameterCount]:
    """Parameters by part; parts that the model does not have are left out.

    A tied head has no parameters of its own; those of the embedding are active as the head's.
    """
    weights = model_weights(config)
    counts = {part: _count([weight for weight in weights if weight.part == part]) for part in PARTS}
    if config.tied_embeddings:
        counts["embedding"] = ParameterCount(counts["embedding"].total, 0)
    return {part: count for part, count in counts.items() if count.total or count.active}


def total_parameters(config: ModelConfig) -> ParameterCount:
    """The sum over all parts."""
    counts = count_parameters(config).values()
    return ParameterCount(sum(count.total for count in counts), sum(count.active for count in counts))


def _count(weights: Iterable[Weight]) -> ParameterCount:
    total = active = 0
    for weight in weights:
        total += weight.numbers * weight.copies
        active += weight.columns if weight.part == "embedding" else weight.numbers * weight.active
    return ParameterCount(total, active)


def released_dtype(config: ModelConfig) -> str:
    """The dtype of the checkpoint's matrices: fp8 where it says so, otherwise float32 or bfloat16 (float16 counts as
    that: both take two bytes). ValueError for a dtype whose bytes are not known."""
    if config.fp8_blocks:
        return "fp8"
    if config.dtype not in _RELEASED:
        raise ValueError(
            f"config.json: dtype {config.dtype!r} is not known (only {', '.join(_RELEASED)}): say --weights"
        )
    return _RELEASED[config.dtype]


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all weights with matrices in `dtype` (one of WEIGHT_DTYPES); see `bytes_of`."""
    return sum(bytes_of(weight, dtype, config.fp8_blocks) * weight.copies for weight in model_weights(config))


def bytes_of(weight: Weight, dtype: str, blocks: Fp8Blocks | None = None) -> int:
    """Bytes of one copy of a weight.

    fp8: one byte, and a float32 scale for each block of 128 x 128 (DeepSeek-V3 report, section 3.3.2). int8: one byte,
    and a float32 scale a row; int4: see `_GROUP`; both as Foveal's `quantise_weight` stores them. Embeddings, the head,
    norms, biases, routers and convolutions stay in two bytes there, and what is kept in float32 in four.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weights in {dtype!r} are not known (only {', '.join(WEIGHT_DTYPES)})")
    if weight.storage == "float32" or dtype == "float32":
        return 4 * weight.numbers
    if weight.storage == "plain" or dtype == "bfloat16":
        return 2 * weight.numbers
    if dtype == "fp8":
        block = blocks or Fp8Blocks()
        return weight.numbers + 4 * -(-weight.rows // block.rows) * -(-weight.columns // block.columns)
    if dtype == "int8":
        return weight.numbers + 4 * weight.rows
    return weight.rows * -(-weight.columns // _GROUP) * _GROUP_BYTES
