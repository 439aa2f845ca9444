"""Normalisation."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x_TX: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467), computed in float32 or more.

    Same shape and dtype as x.
    """
    if x_TX.dtype != torch.float32:
        return functional.rms_norm(x_TX, weight_X.shape, weight_X, eps)
    # torch's own is ten times slower for many float32 rows (benchmarks/kernels.py).
    norm_T1 = torch.linalg.vector_norm(x_TX, dim=-1, keepdim=True)
    return x_TX * torch.rsqrt(norm_T1.square() * (1 / x_TX.shape[-1]) + eps) * weight_X
