"""Normalisation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from foveal.kernels import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); `centred`: * (1 + weight)."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype) if centred else torch.ones(size, dtype=dtype))
        self.eps, self.centred = eps, centred

    @property
    def scale(self) -> Tensor:
        """What is multiplied with: 1 + weight would lose digits in 16 bits."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return 1 + self.weight.to(wide) if self.centred else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        scale = self.scale
        return rms_norm(x.to(scale.dtype), scale, self.eps).to(x.dtype)


class GroupedRMSNorm(RMSNorm):
    """RMS norm of each of several equal parts of the last dimension for itself."""

    def __init__(self, size: int, groups: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__(size, eps, dtype=dtype)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        parts = x.unflatten(-1, (self.groups, -1))
        return rms_norm(parts, torch.ones_like(parts[0, 0]), self.eps).flatten(-2) * self.weight


class LayerNorm(nn.Module):
    """Layer norm with weight and bias in float32 whatever the model's dtype (the indexer's key norm)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """float32, same shape."""
        return layer_norm(x.float(), (x.shape[-1],), self.weight, self.bias, self.eps)
