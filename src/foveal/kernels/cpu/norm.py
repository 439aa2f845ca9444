"""RMS norm (csrc/kernels/norm.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled
from foveal.kernels.norm import add_rms_norm, rms_norm


def _accepts(x: Tensor, weight_X: Tensor, eps: float) -> bool:
    return x.dtype in DTYPES and weight_X.dtype == x.dtype


@compiled(rms_norm, _accepts)
def _rms_norm(kernels: Kernels, x: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    size = weight_X.shape[0]
    _check(x, weight_X)
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    stride = x.stride(0) if x.dim() == 2 else size
    rows, threads = x.numel() // size, torch.get_num_threads()
    addresses = (address(x), stride, 0, 0, address(weight_X), address(out))
    kernels.run.rms_norm(*addresses, rows, size, eps, FORMATS[x.dtype], threads)
    return out


def _accepts_sum(x_TX: Tensor, residual_TX: Tensor, weight_X: Tensor, eps: float) -> bool:
    inner = x_TX.stride(1) == 1 and residual_TX.is_contiguous()
    return _accepts(x_TX, weight_X, eps) and residual_TX.dtype == x_TX.dtype and inner


@compiled(add_rms_norm, _accepts_sum)
def _add_rms_norm(
    kernels: Kernels, x_TX: Tensor, residual_TX: Tensor, weight_X: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check(x_TX, weight_X)
    if residual_TX.shape != x_TX.shape:
        raise ValueError(f"residual has shape {tuple(residual_TX.shape)}, x {tuple(x_TX.shape)}")
    sum_TX, out_TX = torch.empty_like(residual_TX), torch.empty_like(residual_TX)
    rows, size = x_TX.shape
    addresses = tuple(map(address, (residual_TX, sum_TX, weight_X, out_TX)))
    threads = torch.get_num_threads()
    kernels.run.rms_norm(address(x_TX), x_TX.stride(0), *addresses, rows, size, eps, FORMATS[x_TX.dtype], threads)
    return sum_TX, out_TX


def _check(x: Tensor, weight_X: Tensor) -> None:
    if weight_X.dim() != 1 or not weight_X.is_contiguous() or x.shape[-1] != weight_X.shape[0]:
        raise ValueError(f"weight has shape {tuple(weight_X.shape)}, x {tuple(x.shape)}")
