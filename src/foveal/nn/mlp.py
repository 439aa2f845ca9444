"""The dense feed-forward."""

import torch
from torch import Tensor, nn

from foveal.kernels import gated
from foveal.kernels.cpu.blocks import MLPBlock
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import FusedLinear, Linear
from foveal.nn.norm import RMSNorm


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, hidden: int, activation: str, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(hidden_size, {"gate_proj": hidden, "up_proj": hidden}, bias=bias, dtype=dtype)
        self.down_proj = Linear(hidden, hidden_size, bias=bias, dtype=dtype)
        self.activation = activation

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down_proj(gated(self.gate_up_proj(x_TD), self.activation))

    def fused(self, norm: RMSNorm) -> MLPBlock:
        """The block of `norm`, this and a sum, for the kernels."""
        return MLPBlock(norm_of(norm), layer_of(self.gate_up_proj), layer_of(self.down_proj), self.activation)
