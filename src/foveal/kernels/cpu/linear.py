"""Products with weights (csrc/kernels/linear.cpp)."""

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled, instruction_sets, is_intel
from foveal.kernels.matmul import QuantisedWeight, Weight, linear

# Rows of activations from which torch's products win where it has been written for the processor.
_MANY = 128
# The same for quantised weights, which are widened for each call: by the dtype of their values.
_MANY_QUANTISED = {torch.int8: 768, torch.uint8: 384}
# Quantised weights that are widened at a time: some 9 bytes each.
_WIDENED = 1 << 22

# The numbers of `Coding` in csrc/kernels/linear.h.
CODINGS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


def weight_arguments(weight: Weight) -> tuple[int, int, int, int, int, int, int]:
    """The numbers of `WeightArguments` in csrc/bindings/weights.h; of several weights, those of the first."""
    if isinstance(weight, QuantisedWeight):
        return *weight.place, CODINGS[weight.values.dtype]
    outputs, inputs = weight.shape[-2:]
    return address(weight), 0, 0, outputs, inputs, 0, CODINGS[weight.dtype]


def takes_weight(weight: Weight, dtype: torch.dtype, dimensions: int = 2) -> bool:
    """Whether the compiled products can read it for activations of this dtype."""
    if isinstance(weight, QuantisedWeight):
        return weight.values.dim() == dimensions and weight.values.device.type == "cpu"
    return weight.dim() == dimensions and weight.dtype == dtype and not weight.is_mkldnn and weight.is_contiguous()


def _accepts(x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> bool:
    return (
        x_TX.dtype in DTYPES
        and x_TX.dim() == 2
        and x_TX.shape[1] > 0
        and x_TX.stride(1) == 1
        and takes_weight(weight, x_TX.dtype)
        and (bias is None or (bias.dtype == x_TX.dtype and bias.is_contiguous()))
    )


def _check(x_TX: Tensor, weight: Weight, bias: Tensor | None) -> None:
    outputs, inputs = weight.shape
    if x_TX.shape[1] != inputs:
        raise ValueError(f"x has shape {list(x_TX.shape)}, but the weight takes {inputs} inputs")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {list(bias.shape)}, but the weight has {outputs} outputs")


@compiled(linear, _accepts)
def _linear(kernels: Kernels, x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    _check(x_TX, weight, bias)
    rows = x_TX.shape[0]
    out_TY = torch.empty(rows, weight.shape[0], dtype=x_TX.dtype)
    out = address(bias), address(out_TY)
    sizes = rows, FORMATS[x_TX.dtype], torch.get_num_threads()
    kernels.run.linear(address(x_TX), x_TX.stride(0), weight_arguments(weight), *out, *sizes)
    return out_TY


def _torch_wins(x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> bool:
    # With AMX also for quantised weights.
    many = _MANY if isinstance(weight, Tensor) else _MANY_QUANTISED[weight.values.dtype]
    if x_TX.shape[0] < many or not instruction_sets() or not _accepts(x_TX, weight, bias):
        return False
    if x_TX.dtype == torch.bfloat16:
        return instruction_sets()[-1].isa == "amx" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return is_intel() and isinstance(weight, Tensor)


@linear.add("many rows", differentiable=False, devices=("cpu",), accepts=_torch_wins, special=True)
def _linear_many_rows(x_TX: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    _check(x_TX, weight, bias)
    if isinstance(weight, Tensor):
        return plain_linear(x_TX, weight, bias)
    outputs, inputs = weight.shape
    out_TY = x_TX.new_empty(x_TX.shape[0], outputs)
    step = max(1, _WIDENED // inputs)
    for start in range(0, outputs, step):
        some = slice(start, start + step)
        wide_yX = QuantisedWeight(*(part[some] for part in weight.parts)).dequantise(x_TX.dtype)
        out_TY[:, some] = plain_linear(x_TX, wide_yX, None if bias is None else bias[some])
    return out_TY
