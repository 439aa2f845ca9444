"""Matrix products with weights, and the packed weights that make them fast on a CPU."""

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

PACKED_DTYPES = (torch.float32, torch.bfloat16)


def linear(x_TX: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x_TX: [T, X]; weight: [Y, X], plain or from `pack_weight`. Returns [T, Y]."""
    if weight.is_mkldnn:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x_TX, weight, bias, "none", [], "")
        return packed
    return plain_linear(x_TX, weight, bias)


def pack_weight(weight: Tensor) -> Tensor:
    """The weight in oneDNN's blocked order, for inference: 1.2 to 3 times faster for few rows (benchmarks/kernels.py).

    Returned as it is where oneDNN has nothing for it (another device or dtype, or a build without oneDNN).
    """
    usable = torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES
    if not usable:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed
