"""Rotary position embedding (csrc/kernels/rope.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled
from foveal.kernels.rope import apply_rope

MOST_PAIRS = 512  # MOST_ROPE_PAIRS in csrc/kernels/rope.h


def _accepts(x_THR: Tensor, turns_TR: Tensor, *, interleaved: bool) -> bool:
    return (
        x_THR.dtype in DTYPES
        and x_THR.stride(-1) == 1
        and turns_TR.shape[-1] <= MOST_PAIRS
        and turns_TR.is_contiguous()
        and not turns_TR.is_conj()
    )


@compiled(apply_rope, _accepts)
def _apply_rope(kernels: Kernels, x_THR: Tensor, turns_TR: Tensor, *, interleaved: bool) -> Tensor:
    tokens, heads, size = x_THR.shape
    pairs = turns_TR.shape[1]
    if turns_TR.dtype != torch.complex64 or turns_TR.shape[0] != tokens or 2 * pairs > size:
        raise ValueError(f"turns are {turns_TR.dtype} {tuple(turns_TR.shape)}, x has shape {tuple(x_THR.shape)}")
    out_THR = torch.empty((tokens, heads, size), dtype=x_THR.dtype)
    places = (address(x_THR), x_THR.stride(0), x_THR.stride(1), address(out_THR), heads * size, size, address(turns_TR))
    kernels.run.rope(*places, tokens, heads, size, pairs, interleaved, FORMATS[x_THR.dtype], torch.get_num_threads())
    return out_THR
