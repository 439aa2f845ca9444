"""DeepSeek-V3.2's fp8 formulas written down again in float64 (`inference/model.py` and `kernel.py` of its release), and
their counterpart in int8."""

import math

import torch
from torch import Tensor


def every_e4m3() -> list[float]:
    """All finite e4m3 values, from the definition: sign, 4 exponent bits with bias 7, 3 mantissa bits."""
    values = []
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(-size if code & 128 else size)
    return values


def act_quant(x: Tensor) -> tuple[Tensor, float]:
    """`act_quant` of one vector in float64: nearest e4m3 (ties to even) of x / s, s = 2^ceil(log2(amax / 448))."""
    scale = 2.0 ** math.ceil(math.log2(max(x.abs().max().item(), 1e-4) / 448))
    positive = torch.tensor([v for code, v in enumerate(every_e4m3()) if code < 127], dtype=torch.float64)
    size = (x.double() / scale).abs().clamp_max(448)
    upper = torch.searchsorted(positive, size).clamp(1, 126)
    below, above = positive[upper - 1], positive[upper]
    nearest = torch.where(size - below < above - size, upper - 1, upper)
    tied = (size - below == above - size) & (upper % 2 == 1)
    nearest = torch.where(tied, upper - 1, nearest)
    return positive[nearest] * x.sign() * scale, scale


def hadamard_matrix(size: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix in Sylvester order, from its definition."""
    signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


def fp8_index_vectors(x: Tensor) -> Tensor:
    """What is left of index queries or keys [..., J] after `rotate_activation` and `act_quant`, scales applied."""
    turned = (x.double() @ hadamard_matrix(x.shape[-1])).float()
    rows = [act_quant(row)[0] for row in turned.flatten(0, -2)]
    return torch.stack(rows).view(x.shape)


def int8_index_vectors(x: Tensor) -> Tensor:
    """The same with symmetric int8: one scale a vector, amax / 127."""
    turned = x.double() @ hadamard_matrix(x.shape[-1])
    scale = turned.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 127
    return (turned / scale).round() * scale


INDEX_VECTORS = {"fp8": fp8_index_vectors, "int8": int8_index_vectors}
