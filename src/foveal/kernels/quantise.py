"""Numbers of eight bits with scales, and the Hadamard turn that spreads outliers before them."""

import torch
from torch import Tensor

from foveal.kernels.dispatch import operation

E4M3_MAX = 448.0
INT8_MAX = 127.0
SMALLEST_AMAX = 1e-4


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension J (a power of two) by the orthonormal Walsh-Hadamard matrix, Sylvester order.

    Source: DeepSeek-V3.2 `inference/model.py`, `rotate_activation` (scale J^-1/2). Any float dtype, kept.
    Raises ValueError where J is not a power of two.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"the Hadamard transform needs a power-of-two dimension, not {size}")
    distance = 1
    while distance < size:  # sums and differences of numbers so far apart
        first, second = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        distance *= 2
    return x * size**-0.5


def quantise_e4m3(x: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """e4m3 values and one float32 power-of-two scale for each `block` numbers of the last dimension.

    scale = 2^ceil(log2(max(amax, 1e-4) / 448)); value = round(clamp(x / scale, +-448)). Source: DeepSeek-V3.2
    `inference/kernel.py`, `act_quant` with scale_fmt. Returns (float8_e4m3fn like x, float32 [..., ceil(J / block)]).
    """
    size = x.shape[-1]
    blocks = -(-size // block)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * block - size))
    grouped = padded.unflatten(-1, (blocks, block))
    scale = power_of_two_scale(grouped.abs().amax(-1))
    values = (grouped / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return values.flatten(-2)[..., :size].to(torch.float8_e4m3fn), scale


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The smallest power of two s with max(amax, 1e-4) / s <= 448, exactly (float32)."""
    mantissa, exponent = torch.frexp(amax.clamp_min(SMALLEST_AMAX) / E4M3_MAX)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def quantise_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and one float32 scale for each vector of the last dimension: [..., J] and [...].

    scale = max(amax, 1e-4) / 127; value = round(x / scale), ties to even: symmetric, -128 does not occur.
    """
    scale = x.float().abs().amax(-1).clamp_min(SMALLEST_AMAX) / INT8_MAX
    return (x.float() / scale[..., None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


@operation(differentiable=False)
def quantise_index(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Index queries or keys [..., J] in eight bits: a Hadamard turn, then one float32 scale a vector.

    dtype: "fp8" (e4m3, power-of-two scales: `quantise_e4m3`) or "int8" (`quantise_int8`). Returns
    (float8_e4m3fn or int8 [..., J], float32 [...]). Raises ValueError where J is not a power of two.
    """
    return turn_and_quantise(x, dtype)


def turn_and_quantise(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """`quantise_index` in torch."""
    turned = hadamard(x.float())
    if dtype == "int8":
        return quantise_int8(turned)
    assert dtype == "fp8", dtype
    values, scale = quantise_e4m3(turned, block=x.shape[-1])
    return values, scale[..., 0]


def e4m3_to_float32(bytes_: Tensor) -> Tensor:
    """The value of e4m3 bytes (uint8), exactly, denormals included; NaN codes are not expected.

    `Tensor.to` converts e4m3 one number at a time on CPUs; moving the bits into a float16 and letting the CPU widen
    that is several times faster. e4m3's exponent bias is 8 below float16's, hence the factor.
    """
    wide = bytes_.to(torch.int16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.view(torch.float16).to(torch.float32).mul_(256.0)


def to_float32(x: Tensor) -> Tensor:
    """Numbers of any dtype, e4m3 and int8 included, as float32."""
    return e4m3_to_float32(x.view(torch.uint8)) if x.dtype == torch.float8_e4m3fn else x.float()
