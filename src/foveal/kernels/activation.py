"""Gated activations: what stands between the two products of a feed-forward."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from foveal.kernels.dispatch import operation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


@operation(differentiable=True)
def gated(x_TX: Tensor, activation: str) -> Tensor:
    """act(gate) * up of rows that hold the gate in their first half and up in the second (arXiv 2002.05202).

    x_TX: [T, 2F]. activation: a name of `ACTIVATIONS`. Computed in float32 at least, returned as [T, F] in x's dtype.
    """
    gate_TF, up_TF = x_TX.to(torch.promote_types(x_TX.dtype, torch.float32)).chunk(2, -1)
    return (ACTIVATIONS[activation](gate_TF) * up_TF).to(x_TX.dtype)


@gated.add("torch", differentiable=True)
def _gated_torch(x_TX: Tensor, activation: str) -> Tensor:
    """In x's own dtype: the activation is rounded before the product."""
    gate_TF, up_TF = x_TX.chunk(2, -1)
    return ACTIVATIONS[activation](gate_TF) * up_TF
