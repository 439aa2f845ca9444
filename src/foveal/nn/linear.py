"""Linear layers: plain, and several that read the same input fused into one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from foveal.kernels import QuantisedWeight, linear, pack_weight, quantise_weight


class Linear(nn.Module):
    """x W^T + b with weight [out, in].

    For inference, `pack` trades the readable weight for a faster one, and `quantise` for a smaller one.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None
        self.quantised: QuantisedWeight | None = None

    def forward(self, x_TX: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return linear(x_TX, self.weight if self.quantised is None else self.quantised, self.bias)

    def pack(self) -> None:
        """Replace the weight by its packed form: no more gradients, no more saving. A quantised one is that already."""
        if self.quantised is None:
            self.weight = nn.Parameter(pack_weight(self.weight), requires_grad=False)

    def quantise(self, quantization: str) -> None:
        """Replace the weight by its "int8" or "int4" form. Raises as `quantise_weight` does."""
        self.quantised = quantise_weight(self.weight, quantization)
        del self.weight

    @property
    def rounded(self) -> tuple[QuantisedWeight, ...]:
        """The weights that `quantise` left."""
        return () if self.quantised is None else (self.quantised,)


class ExactLinear(Linear):
    """A linear layer that is never quantised."""

    def quantise(self, quantization: str) -> None:
        """Nothing."""


class FusedLinear(Linear):
    """Linear layers that share their input, as one; `parts` names them and their rows, in order."""

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False, dtype: torch.dtype) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype)
        self.parts = dict(parts)

    def split(self, x_TX: Tensor) -> tuple[Tensor, ...]:
        """[T, in] -> one [T, rows] for each part."""
        return self(x_TX).split(list(self.parts.values()), -1)
