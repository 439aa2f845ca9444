"""Rotary position embedding."""

import torch
from torch import Tensor

from foveal.kernels.dispatch import operation


@operation(differentiable=True)
def apply_rope(x_THR: Tensor, turns_TR: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first 2r dimensions of the last axis, pair by pair (arXiv 2104.09864, section 3.4.2).

    x_THR: [T, H, X >= 2r], any float dtype. turns_TR: complex64 [T, r], a unit complex number (times yarn's attention
    factor) for each pair. Pairs are (0, 1), (2, 3), ... when `interleaved`, otherwise (i, i + r) within the 2r.
    Computed in float32 at least, returned in x's dtype.
    """
    half = turns_TR.shape[-1]
    wide_THR = x_THR.to(torch.promote_types(x_THR.dtype, torch.float32))
    real_T1R, imaginary_T1R = turns_TR.real[:, None].to(wide_THR), turns_TR.imag[:, None].to(wide_THR)
    turned_THR = wide_THR.clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    turned_THR[..., first] = wide_THR[..., first] * real_T1R - wide_THR[..., second] * imaginary_T1R
    turned_THR[..., second] = wide_THR[..., first] * imaginary_T1R + wide_THR[..., second] * real_T1R
    return turned_THR.to(x_THR.dtype)


@apply_rope.add("torch", differentiable=True)
def _apply_rope_complex(x_THR: Tensor, turns_TR: Tensor, *, interleaved: bool) -> Tensor:
    """A pair is a complex number, so turning it is one product."""
    half = turns_TR.shape[-1]
    pairs_THR = x_THR[..., : 2 * half].float()
    if interleaved:
        pairs_THR = torch.view_as_complex(pairs_THR.unflatten(-1, (half, 2)).contiguous()) * turns_TR[:, None]
        turned_THR = torch.view_as_real(pairs_THR).flatten(-2)
    else:
        pairs_THR = torch.complex(pairs_THR[..., :half], pairs_THR[..., half:]) * turns_TR[:, None]
        turned_THR = torch.cat((pairs_THR.real, pairs_THR.imag), -1)
    turned_THR = turned_THR.to(x_THR.dtype)
    if x_THR.shape[-1] == 2 * half:
        return turned_THR
    return torch.cat((turned_THR, x_THR[..., 2 * half :]), -1)
