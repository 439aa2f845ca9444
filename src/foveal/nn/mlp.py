"""The dense feed-forward and its activations."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveal.nn.linear import FusedLinear, Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, hidden: int, activation: str, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(hidden_size, {"gate_proj": hidden, "up_proj": hidden}, bias=bias, dtype=dtype)
        self.down_proj = Linear(hidden, hidden_size, bias=bias, dtype=dtype)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gate_TF, up_TF = self.gate_up_proj.split(x_TD)
        return self.down_proj(self.activation(gate_TF) * up_TF)
