"""Products with weights (csrc/kernels/linear.cpp)."""

from typing import Any

import torch
from torch import Tensor

from foveal.kernels.cpu.library import FORMATS, Kernels, address, compiled
from foveal.kernels.matmul import QuantisedWeight, Weight, linear

_DTYPES = (torch.float32, torch.bfloat16)
# The numbers of `Coding` in csrc/kernels/linear.h.
CODINGS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


def weight_arguments(weight: Weight) -> tuple[int, int, int, int, int, int, int]:
    """The numbers of `Weight` in csrc/kernels/linear.h, in its order. Raises ValueError for parts that do not fit."""
    if isinstance(weight, Tensor):
        outputs, inputs = weight.shape
        return address(weight), 0, 0, outputs, inputs, 0, CODINGS[weight.dtype]
    _check_parts(weight)
    outputs, inputs = weight.shape
    parts = address(weight.values), address(weight.scales), address(weight.lows)
    return *parts, outputs, inputs, weight.group, CODINGS[weight.values.dtype]


def takes_weight(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether the compiled products can read it for activations of this dtype."""
    if isinstance(weight, QuantisedWeight):
        return weight.values.device.type == "cpu"
    return not weight.is_mkldnn and weight.dtype == dtype and weight.dim() == 2 and weight.is_contiguous()


def _check_parts(weight: QuantisedWeight) -> None:
    outputs, inputs = weight.shape
    parts: Any = (weight.values, weight.scales) if weight.lows is None else (weight.values, weight.scales, weight.lows)
    dtypes = [part.dtype for part in parts]
    if weight.lows is None:
        fits = dtypes == [torch.int8, torch.float32] and weight.scales.shape == (outputs,)
    else:
        fits = dtypes == [torch.uint8, torch.bfloat16, torch.bfloat16] and weight.scales.shape == weight.lows.shape
        fits = fits and weight.scales.shape[0] == outputs and weight.scales.shape[1] * weight.group == inputs
        fits = fits and weight.group in (32, 64, 128)
    if not fits or not all(part.is_contiguous() for part in parts):
        shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        raise ValueError(f"the parts of a quantised weight do not fit together: {shapes}")


def _accepts(x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> bool:
    return (
        x_TX.dtype in _DTYPES
        and x_TX.dim() == 2
        and x_TX.stride(1) == 1
        and takes_weight(weight, x_TX.dtype)
        and (bias is None or (bias.dtype == x_TX.dtype and bias.is_contiguous()))
    )


@compiled(linear, _accepts)
def _linear(kernels: Kernels, x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    outputs, inputs = weight.shape
    if x_TX.shape[1] != inputs:
        raise ValueError(f"x has shape {list(x_TX.shape)}, but the weight takes {inputs} inputs")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {list(bias.shape)}, but the weight has {outputs} outputs")
    rows = x_TX.shape[0]
    out_TY = torch.empty(rows, outputs, dtype=x_TX.dtype)
    parts = weight_arguments(weight)
    kernels.run.linear(
        address(x_TX), x_TX.stride(0), *parts, address(bias), address(out_TY), rows, FORMATS[x_TX.dtype], torch.get_num_threads()
    )
    return out_TY
