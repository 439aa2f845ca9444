"""Blocks that can run as one compiled call. What they compute is defined by the modules; this is only how."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from foveal.cache.layouts import BlockCache
from foveal.kernels.cpu.block import Layer, Norm
from foveal.nn.linear import Linear
from foveal.nn.norm import RMSNorm
from foveal.nn.step import Step

FusedBlock = Callable[[Tensor, Step, BlockCache | None], Tensor]
"""x + operation(norm(x)), [T, D] -> [T, D], for a step that `Step.fusable` says is one."""


@runtime_checkable
class Fuses(Protocol):
    """An operation that has a fused form."""

    def fuse(self, norm: RMSNorm) -> FusedBlock | None:
        """The whole block of `norm` and this operation, made of their weights as they are now; None where this machine
        has no kernels for them."""


def norm_of(norm: RMSNorm) -> Norm:
    """A norm as the kernels take it."""
    return Norm(norm.weight, norm.eps)


def layer_of(linear: Linear) -> Layer:
    """A linear layer as the kernels take it."""
    return Layer(linear.weight, linear.bias)
