"""Rotary position embedding."""

import torch
from torch import Tensor


def apply_rope(x_THR: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first 2r dimensions of the last axis by the angles whose cosines and sines are given (float32 [T, r]).

    Pairs are (0, 1), (2, 3), ... when `interleaved`, otherwise (i, i + r) within those 2r. x_THR: [T, H, X >= 2r], any
    float dtype; computed in float32, returned in x's dtype.
    """
    half = cos_TR.shape[-1]
    turned_THR = x_THR[..., : 2 * half].float()
    if interleaved:
        pairs = torch.view_as_complex(turned_THR.unflatten(-1, (half, 2)).contiguous())
        turned_THR = torch.view_as_real(pairs * torch.complex(cos_TR, sin_TR)[:, None]).flatten(-2)
    else:
        cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
        first_THR, second_THR = turned_THR[..., :half], turned_THR[..., half:]
        turned_THR = torch.cat(
            (first_THR * cos_T1R - second_THR * sin_T1R, second_THR * cos_T1R + first_THR * sin_T1R), -1
        )
    turned_THR = turned_THR.to(x_THR.dtype)
    if x_THR.shape[-1] == 2 * half:
        return turned_THR
    return torch.cat((turned_THR, x_THR[..., 2 * half :]), -1)
