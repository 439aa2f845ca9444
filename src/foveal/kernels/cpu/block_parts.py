"""What residual blocks are made of, as the compiled kernels take them (csrc/kernels/block.h).

Addresses of weights are kept: a weight that is replaced afterwards is not noticed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from foveal.config.model import RopeConfig
from foveal.kernels.cpu.library import DTYPES, FORMATS, address
from foveal.kernels.cpu.linear import takes_weight, weight_arguments
from foveal.kernels.cpu.rope import MOST_PAIRS
from foveal.kernels.matmul import Weight


@dataclass(frozen=True)
class Norm:
    """An RMS norm: weight [X] and epsilon."""

    weight_X: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight [out, in], bias [out] or none."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True)
class CachedRows:
    """A cache as addresses, for as long as its tensors live."""

    parts: list[tuple[int, int, int]]
    """Three: where each begins, bytes from one row (page, slot) to the next, and its format; NO_PART for one that is
    not there."""
    rows: int
    """As many as all parts have, or slots."""


NO_PART = (0, 0, 0)
"""The arguments of a part that is not there."""

NO_LAYER = (0,) * 8
"""The arguments of a layer that is not there."""


def pairs_of(rope: RopeConfig | None) -> int:
    """Pairs that a rope turns."""
    return rope.dim // 2 if rope else 0


def can_turn(ropes: Sequence[RopeConfig | None]) -> bool:
    """Whether the kernels can make these turns."""
    return all(pairs_of(rope) <= MOST_PAIRS for rope in ropes)


def readable(norms: list[Norm], layers: list[Layer]) -> bool:
    """Whether everything is of one supported dtype, on the CPU and laid out as the kernels read it."""
    dtype = norms[0].weight_X.dtype
    vectors = [one.weight_X for one in norms] + [layer.bias for layer in layers if layer.bias is not None]
    return (
        dtype in DTYPES
        and all(v.dtype == dtype and v.device.type == "cpu" and v.is_contiguous() for v in vectors)
        and all(takes_weight(layer.weight, dtype) for layer in layers)
    )


def norm_arguments(norm: Norm) -> tuple[int, int, float, int]:
    """`NormArguments` of csrc/bindings/block.cpp."""
    return address(norm.weight_X), norm.weight_X.shape[0], norm.eps, FORMATS[norm.weight_X.dtype]


def layer_arguments(layer: Layer | None) -> tuple[int, ...]:
    """`LayerArguments` of csrc/bindings/block.cpp; a layer that may not be there is NO_LAYER."""
    return (*weight_arguments(layer.weight), address(layer.bias)) if layer else NO_LAYER
