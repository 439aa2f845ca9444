"""RMS norm, alone and after a residual sum."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from foveal.kernels.dispatch import operation


@operation(differentiable=True)
def rms_norm(x: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension X (arXiv 1910.07467).

    Computed in float32 at least, returned in x's shape and dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight_X).to(x.dtype)


@rms_norm.add("torch", differentiable=True)
def _rms_norm_torch(x: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    return torch_rms_norm(x, weight_X.shape, weight_X, eps)


@operation(differentiable=True)
def add_rms_norm(x_TX: Tensor, residual_TX: Tensor, weight_X: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + residual, and its RMS norm (see `rms_norm`): [T, X] each, in x's dtype."""
    sum_TX = x_TX + residual_TX
    return sum_TX, rms_norm(sum_TX, weight_X, eps)
