"""Eight-bit floats with power-of-two scales, and the Hadamard turn that spreads outliers before them."""

from functools import lru_cache

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension J (a power of two) by the orthonormal Walsh-Hadamard matrix, Sylvester order.

    Source: DeepSeek-V3.2 `inference/model.py`, `rotate_activation` (scale J^-1/2). float32 in, float32 out.
    Raises ValueError where J is not a power of two.
    """
    return x @ _hadamard_matrix(x.shape[-1]).to(x)


@lru_cache
def _hadamard_matrix(size: int) -> Tensor:
    if size < 1 or size & (size - 1):
        raise ValueError(f"the Hadamard transform needs a power-of-two dimension, not {size}")
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return matrix * size**-0.5


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


def e4m3_to_float32(bytes_: Tensor) -> Tensor:
    """The value of e4m3 bytes (uint8), exactly, denormals included; NaN codes are not expected.

    `Tensor.to` converts e4m3 one number at a time on CPUs; moving the bits into a float16 and letting the CPU widen
    that is several times faster. e4m3's exponent bias is 8 below float16's, hence the factor.
    """
    wide = bytes_.to(torch.int16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.view(torch.float16).to(torch.float32).mul_(256.0)
