"""Matrix products with weights: plain, packed by oneDNN, or quantised."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from foveal.kernels.dispatch import operation

# A product with packed weights takes longer to start, which small ones do not earn back for one row.
_SMALLEST_PACKED = {torch.float32: 1 << 16, torch.bfloat16: 1 << 14}

QUANTIZATIONS = ("int8", "int4")
"""What weights can be quantised to."""
INT4_GROUPS = (32, 64, 128)
# Inputs whose nibbles share 16 bytes: input j is the low half of byte j, input j + 16 the high half.
_UNIT = 32


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight [Y, X] in 8 or 4 bits, or several of them, [E, Y, X]: all parts have the further dimension.

    int8: values int8 [Y, X] from -127 to 127, scales float32 [Y]; W = scale * value. `lows` is None.
    int4: values uint8 [Y, X / 2], two of 0 to 15 in a byte: of each 32 inputs, byte j holds input j in its low half and
    input j + 16 in its high half. scales and lows bfloat16 [Y, X / group]; W = scale * value + low.

    Raises ValueError for parts that do not fit together, or are not contiguous.
    """

    values: Tensor
    scales: Tensor
    lows: Tensor | None = None

    def __post_init__(self) -> None:
        *outer, inputs = self.shape
        dtypes = [part.dtype for part in self.parts]
        if self.lows is None:
            fits = dtypes == [torch.int8, torch.float32] and list(self.scales.shape) == outer
        else:
            *rows, groups = self.scales.shape
            fits = dtypes == [torch.uint8, torch.bfloat16, torch.bfloat16] and self.lows.shape == self.scales.shape
            fits = fits and rows == outer and inputs in [group * groups for group in INT4_GROUPS]
        if not fits or not all(part.is_contiguous() for part in self.parts):
            shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in self.parts)
            raise ValueError(f"the parts of a quantised weight do not fit together: {shapes}")

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight: [Y, X] or [E, Y, X]."""
        *outer, width = self.values.shape
        return *outer, width if self.lows is None else 2 * width

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-1] if self.lows is None else self.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def place(self) -> tuple[int, int, int, int, int, int]:
        """For compiled kernels: where values, scales and lows begin (no lows: 0), outputs, inputs, group (int8: 0)."""
        outputs, inputs = self.shape[-2:]
        if self.lows is None:
            return self.values.data_ptr(), self.scales.data_ptr(), 0, outputs, inputs, 0
        parts = self.values.data_ptr(), self.scales.data_ptr(), self.lows.data_ptr()
        return *parts, outputs, inputs, self.group

    def forget_place(self) -> None:
        """The parts have been moved."""
        self.__dict__.pop("place", None)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that there are."""
        return (self.values, self.scales) if self.lows is None else (self.values, self.scales, self.lows)

    def __getitem__(self, index: int) -> "QuantisedWeight":
        """One of several."""
        lows = None if self.lows is None else self.lows[index]
        return QuantisedWeight(self.values[index], self.scales[index], lows)

    def __len__(self) -> int:
        return len(self.values)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: what the weight stands for, computed in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        if self.lows is None:
            return (self.values.to(wide) * self.scales[..., None]).to(dtype)
        pairs = self.values.unflatten(-1, (-1, _UNIT // 2))
        grouped = torch.cat((pairs & 15, pairs >> 4), -1).flatten(-2).unflatten(-1, (-1, self.group))
        return (grouped * self.scales[..., None].to(wide) + self.lows[..., None].to(wide)).flatten(-2).to(dtype)


Weight = Tensor | QuantisedWeight


def quantise_weight(weight: Tensor, quantization: str, group: int = 32) -> QuantisedWeight:
    """Round a weight [Y, X], or several [E, Y, X], to 8 bits, one scale an output, or to 4 bits, a scale and a lowest
    value for each `group` of inputs.

    Rounding is to the nearest; a group's 16 values are spread evenly from its smallest weight to its largest. Raises
    ValueError for another `quantization`, another group than 32, 64 or 128, inputs that the group does not divide, and
    weights that are not finite.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    if group not in INT4_GROUPS:
        raise ValueError(f"int4 groups are {', '.join(map(str, INT4_GROUPS))} inputs, not {group!r}")
    if quantization == "int4" and weight.shape[-1] % group:
        raise ValueError(f"int4 in groups of {group} needs inputs that {group} divides, not {weight.shape[-1]}")
    quantise = _int8 if quantization == "int8" else partial(_int4, group=group)
    if weight.dim() == 2:
        return quantise(weight.detach().float())
    first = quantise(weight[0].detach().float())  # one at a time: float32 copies of all would be large
    several = QuantisedWeight(*(part.new_empty(len(weight), *part.shape) for part in first.parts))
    for e, one in enumerate(weight):
        for part, whole in zip(quantise(one.detach().float()).parts, several.parts, strict=True):
            whole[e] = part
    return several


def _int8(weight_YX: Tensor) -> QuantisedWeight:
    scales_Y = _finite(weight_YX.abs().amax(1)) / 127
    values_YX = weight_YX / torch.where(scales_Y == 0, 1, scales_Y)[:, None]
    return QuantisedWeight(values_YX.round_().clamp_(-127, 127).to(torch.int8), scales_Y)


def _int4(weight_YX: Tensor, group: int) -> QuantisedWeight:
    grouped_YXG = weight_YX.unflatten(1, (-1, group))
    lows_YX, highs_YX = (_finite(bound) for bound in grouped_YXG.aminmax(dim=-1))
    lows_YX = lows_YX.bfloat16()
    scales_YX = ((highs_YX - lows_YX.float()) / 15).bfloat16()
    # From the rounded scales and lows, so that their rounding is made up for.
    steps_YX1 = torch.where(scales_YX == 0, 1, scales_YX).float()[..., None]
    values_YXG = ((grouped_YXG - lows_YX.float()[..., None]) / steps_YX1).round_().clamp_(0, 15).to(torch.uint8)
    halves = values_YXG.flatten(1).unflatten(1, (-1, 2, _UNIT // 2))
    return QuantisedWeight((halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1), scales_YX, lows_YX)


def _finite(bounds: Tensor) -> Tensor:
    if not bounds.isfinite().all():
        raise ValueError("a weight holds infinities or NaN, which cannot be quantised")
    return bounds


@operation(differentiable=True)
def linear(x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x_TX: [T, X]; weight: [Y, X], plain, from `pack_weight` or quantised. Returns [T, Y] in x's dtype."""
    if isinstance(weight, QuantisedWeight):
        weight = weight.dequantise(x_TX.dtype)
    elif weight.is_mkldnn:
        weight = weight.to_dense()
    result = x_TX @ weight.T
    return result if bias is None else result + bias


@linear.add("torch", differentiable=True)
def _linear_torch(x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return plain_linear(x_TX, weight.dequantise(x_TX.dtype) if isinstance(weight, QuantisedWeight) else weight, bias)


def _is_packed(x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> bool:
    return isinstance(weight, Tensor) and weight.is_mkldnn


@linear.add("onednn", differentiable=False, devices=("cpu",), accepts=_is_packed)
def _linear_packed(x_TX: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._linear_pointwise(x_TX, weight, bias, "none", [], "")
    return packed


def pack_weight(weight: Tensor) -> Tensor:
    """The weight in oneDNN's blocked order, for inference: faster than torch's product for few rows.

    Figures: benchmarks/kernels.py. Returned as it is where that gains nothing (small weights; compiled products with
    vector instructions, as fast on readable weights) or cannot be (another device or dtype, no oneDNN).
    """
    if (
        linear.chosen() not in ("onednn", "portable")
        or not _packable(weight)
        or weight.numel() <= _SMALLEST_PACKED[weight.dtype]
    ):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return weight.dtype in _SMALLEST_PACKED
