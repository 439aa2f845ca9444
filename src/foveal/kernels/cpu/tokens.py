"""What the compiled recurrences read, as addresses: numbers of each token, and which tokens are whose."""

import torch
from torch import Tensor

from foveal.kernels.cpu.library import address
from foveal.kernels.keys import Queries


def all_float32(*tensors: Tensor) -> bool:
    """The format of all recurrences but the convolution: states are never rounded further."""
    return all(x.dtype == torch.float32 for x in tensors)


def check_shapes(**tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """ValueError unless each tensor has the shape beside it."""
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")


def check_groups(heads: int, groups: int) -> None:
    """ValueError unless groups serve equal numbers of heads."""
    if not groups or heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups")


def by_token(tensor: Tensor) -> Tensor:
    """[T, ...]: the same where what a token has follows one another, otherwise a copy."""
    size = 1
    for dim in range(tensor.dim() - 1, 0, -1):
        if tensor.stride(dim) != size and tensor.shape[dim] != 1:
            return tensor.contiguous()
        size *= tensor.shape[dim]
    return tensor


def rows(tensor: Tensor) -> tuple[int, int]:
    """Address of what `by_token` returned, and the numbers from one token to the next."""
    return tensor.data_ptr(), tensor.stride(0)


def span_arguments(tokens: int, queries: Queries) -> tuple[int, int, int]:
    """The arguments of `spans_at` in csrc/bindings/tokens.h, which checks them."""
    return len(queries.positions), address(queries.block), tokens
