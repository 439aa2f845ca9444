"""The causal convolution (csrc/kernels/conv.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled
from foveal.kernels.cpu.tokens import by_token, check_shapes, rows, span_arguments
from foveal.kernels.keys import Queries
from foveal.kernels.scan import causal_conv


def _accepts(x_TX: Tensor, weight_XW: Tensor, bias_X: Tensor | None, state_SWX: Tensor, queries: Queries) -> bool:
    tensors = (weight_XW, state_SWX) if bias_X is None else (weight_XW, state_SWX, bias_X)
    return x_TX.dtype in DTYPES and all(x.dtype == x_TX.dtype for x in tensors)


@compiled(causal_conv, _accepts)
def _causal_conv(
    kernels: Kernels, x_TX: Tensor, weight_XW: Tensor, bias_X: Tensor | None, state_SWX: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    tokens, channels = x_TX.shape
    taps = weight_XW.shape[1]
    check_shapes(weight=(weight_XW, (channels, taps)), state=(state_SWX, (len(queries.positions), taps - 1, channels)))
    if bias_X is not None:
        check_shapes(bias=(bias_X, (channels,)))
        bias_X = bias_X.contiguous()
    x_TX, weight_XW, state_SWX = by_token(x_TX), weight_XW.contiguous(), state_SWX.contiguous()
    y_TX, last_SWX = torch.empty(x_TX.shape, dtype=x_TX.dtype), torch.empty(state_SWX.shape, dtype=x_TX.dtype)
    places = tuple(map(address, (weight_XW, bias_X, state_SWX, last_SWX, y_TX)))
    spans = span_arguments(tokens, queries)
    threads = torch.get_num_threads()
    kernels.run.causal_conv(rows(x_TX), *places, channels, taps, FORMATS[x_TX.dtype], *spans, threads)
    return y_TX, last_SWX
