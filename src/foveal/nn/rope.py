"""Rotary turns for every scaling."""

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from foveal.config.model import RopeConfig
from foveal.kernels.transfer import send


def rope_turns(rope: RopeConfig, positions_T: Tensor, prompts_T: Tensor | None, *, exact: bool = False) -> Tensor:
    """By how much each pair of each token is turned: complex64 [T, dim / 2], of absolute value 1 (yarn: its factor).

    positions_T: int64 [T]. prompts_T: the prompt length of each token's sequence, for `dynamic` scaling only: there the
    frequencies of a token depend on max(prompt length, its position + 1), which is what generating token by token after
    a whole prompt does in transformers, and does not change with chunking or recomputation.
    exact: angles from float64. In float32, as transformers has them, they are off by up to half a unit in their last
    place: 0.004 before position 131072, which costs nothing, but 0.13 before 4194304, which does.
    """
    if rope.scaling.kind == "dynamic":
        assert prompts_T is not None
        frequencies = _dynamic_frequencies(rope, positions_T, prompts_T)
    else:
        frequencies = _frequencies_on(rope, positions_T.device)
    wide = torch.float64 if exact else torch.float32
    angles_TR = positions_T[:, None].to(wide) * frequencies.to(wide)
    if exact:
        angles_TR = angles_TR.remainder(2 * math.pi).float()
    return torch.polar(torch.full_like(angles_TR, rope.scaling.attention_factor), angles_TR)


@lru_cache
def frequencies_of(rope: RopeConfig) -> Tensor:
    """Inverse frequencies, float32 [dim / 2], of every scaling but `dynamic`."""
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        return _frequencies(rope)


@cache  # for good: CUDA graphs read it
def _frequencies_on(rope: RopeConfig, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return send(frequencies_of(rope), device)


def _frequencies(rope: RopeConfig) -> Tensor:
    plain_R = _inverse_powers(rope.theta, rope.dim)
    scaling = rope.scaling
    if scaling.kind == "linear":
        return plain_R / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(rope, plain_R)
    if scaling.kind == "yarn":
        return _yarn(rope, plain_R)
    return plain_R


def _inverse_powers(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


def _llama3(rope: RopeConfig, plain_R: Tensor) -> Tensor:
    """Llama 3.1: long waves slowed down, short ones kept, a ramp between (`transformers` modeling_rope_utils)."""
    scaling = rope.scaling
    wavelengths_R = 2 * math.pi / plain_R
    ramp_R = (scaling.original_max_positions / wavelengths_R - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept_R = ramp_R.clamp(0, 1)
    return plain_R / scaling.factor * (1 - kept_R) + plain_R * kept_R


def _yarn(rope: RopeConfig, plain_R: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate dimensions that turn less than beta_slow times within the
    trained context, keep those that turn more than beta_fast times, a ramp between."""
    scaling = rope.scaling

    def dimension(turns: float) -> float:
        length = scaling.original_max_positions
        return rope.dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # as in the reference: avoids a division by zero
    ramp_R = ((torch.arange(rope.dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return plain_R / scaling.factor * ramp_R + plain_R * (1 - ramp_R)


def _dynamic_frequencies(rope: RopeConfig, positions_T: Tensor, prompts_T: Tensor) -> Tensor:
    """float32 [T, dim / 2]. Dynamic NTK: theta grows with the length seen (`transformers` modeling_rope_utils)."""
    scaling, dim = rope.scaling, rope.dim
    length_T = torch.maximum(prompts_T, positions_T + 1).clamp_min(scaling.original_max_positions)
    stretch_T = scaling.factor * length_T / scaling.original_max_positions - (scaling.factor - 1)
    theta_T = rope.theta * stretch_T.double() ** (dim / (dim - 2))
    exponents_R = torch.arange(0, dim, 2, device=positions_T.device).double() / dim
    return (1.0 / theta_T[:, None] ** exponents_R).float()
