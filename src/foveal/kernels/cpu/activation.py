"""Gated activations (csrc/kernels/activation.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.activation import gated
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled

COMPILED = {"silu": 0, "gelu_pytorch_tanh": 1, "relu": 2}
"""Activations by the numbers of `Activation` in csrc/kernels/activation.h."""


def _accepts(x_TX: Tensor, activation: str) -> bool:
    return x_TX.dtype in DTYPES and activation in COMPILED and x_TX.dim() == 2 and x_TX.stride(1) == 1


@compiled(gated, _accepts)
def _gated(kernels: Kernels, x_TX: Tensor, activation: str) -> Tensor:
    rows, both = x_TX.shape
    if both % 2:
        raise ValueError(f"x has {both} columns, which are not two halves")
    out_TF = torch.empty((rows, both // 2), dtype=x_TX.dtype)
    places = (address(x_TX), x_TX.stride(0), address(out_TF))
    threads = torch.get_num_threads()
    kernels.run.gated(*places, rows, both // 2, COMPILED[activation], FORMATS[x_TX.dtype], threads)
    return out_TF
