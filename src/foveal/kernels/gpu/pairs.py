"""Products of tokens with the experts that they chose, for decode steps.

A program computes some outputs of one pair of a token and an expert: few tokens share an expert, so weights are read
about once whatever a tile looks like, and reading them is all that takes time. Nothing is grouped by counts, which the
host would have to wait for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu.launch import Launch, block_size, ceil_div


@triton.jit
def pair_kernel(x, weight, chosen, order, out, shared, inputs, outputs, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Outputs [BLOCK_Y] of one pair. `shared`: pairs that follow one another and read the same row of x."""
    pair = tl.load(order + tl.program_id(0))
    expert = tl.load(chosen + pair)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    sum_YX = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    row_Y = (expert * outputs + y) * inputs
    for at in range(0, inputs, BLOCK_X):
        i = at + tl.arange(0, BLOCK_X)
        inside = (y < outputs)[:, None] & (i < inputs)[None, :]
        x_X = tl.load(x + (pair // shared) * inputs + i, mask=i < inputs, other=0.0).to(tl.float32)
        w_YX = tl.load(weight + row_Y[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_YX += w_YX * x_X[None, :]
    tl.store(out + pair * outputs + y, tl.sum(sum_YX, 1).to(out.dtype.element_ty), mask=y < outputs)


def pair_products(x: Tensor, weight_EYX: Tensor, chosen_TA: Tensor, order_X: Tensor) -> tuple[Launch, Tensor]:
    """Plan x W[e]^T for every pair: the launch, and the results [T, A, Y]. x: [T, X], or [T, A, X], a row a pair.

    order_X: int64 [T A], the order in which pairs run. ValueError where shapes do not fit.
    """
    _, outputs, inputs = weight_EYX.shape
    tokens, chosen = chosen_TA.shape
    if x.shape not in ((tokens, inputs), (tokens, chosen, inputs)):
        raise ValueError(f"x {list(x.shape)} does not fit experts of {inputs} inputs, chosen {list(chosen_TA.shape)}")
    out_TAY = torch.empty(tokens, chosen, outputs, dtype=x.dtype, device=x.device)
    rows = min(16, block_size(outputs))
    launch = Launch(
        pair_kernel,
        (tokens * chosen, ceil_div(outputs, rows)),
        {
            "x": x.contiguous(),
            "weight": weight_EYX,
            "chosen": chosen_TA.contiguous(),
            "order": order_X,
            "out": out_TAY,
            "shared": chosen if x.dim() == 2 else 1,
            "inputs": inputs,
            "outputs": outputs,
        },
        {"BLOCK_Y": rows, "BLOCK_X": min(256, block_size(inputs))},
    )
    return launch, out_TAY
