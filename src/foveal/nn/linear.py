"""Linear layers: plain, and several that read the same input fused into one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from foveal.kernels import linear, pack_weight


class Linear(nn.Module):
    """x W^T + b with weight [out, in]. `pack` trades the readable weight for a faster one, for inference."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x_TX: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return linear(x_TX, self.weight, self.bias)

    def pack(self) -> None:
        """Replace the weight by its packed form: no more gradients, no more saving."""
        self.weight = nn.Parameter(pack_weight(self.weight), requires_grad=False)


class FusedLinear(Linear):
    """Linear layers that share their input, as one; `parts` names them and their rows, in order."""

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False, dtype: torch.dtype) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype)
        self.parts = dict(parts)

    def split(self, x_TX: Tensor) -> tuple[Tensor, ...]:
        """[T, in] -> one [T, rows] for each part."""
        return self(x_TX).split(list(self.parts.values()), -1)
