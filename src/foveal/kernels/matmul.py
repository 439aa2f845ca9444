"""Matrix products with weights: plain, packed by oneDNN, or quantised."""

from dataclasses import dataclass
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
    """A weight [Y, X] in 8 or 4 bits.

    int8: values int8 [Y, X] from -127 to 127, scales float32 [Y]; W = scale * value. `lows` is None.
    int4: values uint8 [Y, X / 2], two of 0 to 15 in a byte: of each 32 inputs, byte j holds input j in its low and input
    j + 16 in its high half. scales and lows bfloat16 [Y, X / group]; W = scale * value + low.
    """

    values: Tensor
    scales: Tensor
    lows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, width = self.values.shape
        return outputs, width if self.lows is None else 2 * width

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] if self.lows is None else self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in (self.values, self.scales, self.lows) if part is not None)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """[Y, X] in `dtype`: what the weight stands for, computed in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        if self.lows is None:
            return (self.values.to(wide) * self.scales[:, None]).to(dtype)
        bytes_YUX = self.values.unflatten(1, (-1, _UNIT // 2))
        grouped_YXG = torch.cat((bytes_YUX & 15, bytes_YUX >> 4), -1).view(len(self.values), -1, self.group)
        return (grouped_YXG * self.scales[..., None].to(wide) + self.lows[..., None].to(wide)).flatten(1).to(dtype)


Weight = Tensor | QuantisedWeight


def quantise_weight(weight_YX: Tensor, quantization: str, group: int = 32) -> QuantisedWeight:
    """Round a weight to 8 bits, one scale an output, or to 4 bits, a scale and a lowest value for `group` inputs.

    Rounding is to the nearest. Raises ValueError for another `quantization`, another group than 32, 64 or 128, inputs
    that the group does not divide, and weights that are not finite.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    wide_YX = weight_YX.detach().float()
    if not wide_YX.isfinite().all():
        raise ValueError(f"a weight of shape {list(weight_YX.shape)} holds infinities or NaN, which have no {quantization}")
    if quantization == "int8":
        scales_Y = wide_YX.abs().amax(1) / 127
        values_YX = wide_YX / torch.where(scales_Y == 0, 1, scales_Y)[:, None]
        return QuantisedWeight(values_YX.round_().to(torch.int8), scales_Y)
    if group not in INT4_GROUPS:
        raise ValueError(f"int4 groups are {', '.join(map(str, INT4_GROUPS))} inputs, not {group!r}")
    if wide_YX.shape[1] % group:
        raise ValueError(f"int4 in groups of {group} needs inputs that {group} divides, not {wide_YX.shape[1]}")
    return _int4(wide_YX, group)


def _int4(weight_YX: Tensor, group: int) -> QuantisedWeight:
    grouped_YXG = weight_YX.unflatten(1, (-1, group))
    lows_YX, highs_YX = (bound.bfloat16() for bound in grouped_YXG.aminmax(dim=-1))
    scales_YX = ((highs_YX.float() - lows_YX.float()) / 15).bfloat16()
    # From the rounded scales and lows, so that their rounding is made up for.
    steps_YX1 = torch.where(scales_YX == 0, 1, scales_YX).float()[..., None]
    values_YXG = ((grouped_YXG - lows_YX.float()[..., None]) / steps_YX1).round_().clamp_(0, 15).to(torch.uint8)
    halves = values_YXG.flatten(1).unflatten(1, (-1, 2, _UNIT // 2))
    return QuantisedWeight((halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1), scales_YX, lows_YX)


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
    """The weight in oneDNN's blocked order, for inference: 1.3 to 2.5 times faster for few rows.

    Figures: benchmarks/kernels.py. Returned as it is where that gains nothing (small weights) or cannot be (another
    device or dtype, no oneDNN).
    """
    if not _packable(weight) or weight.numel() <= _SMALLEST_PACKED[weight.dtype]:
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
