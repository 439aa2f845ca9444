"""Mamba-2's state space duality: a selective scan with one decay a head, which is linear attention with that decay."""

import torch
from torch import Tensor

from foveal.kernels.delta import linear_attention_in_chunks
from foveal.kernels.dispatch import operation
from foveal.kernels.keys import Queries


@operation(differentiable=True)
def ssd(
    x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGY: Tensor, c_TGY: Tensor, state_SHPY: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt x B^T; y = h C, for each head (arXiv 2405.21060, section 3).

    x_THP: [T, H, P]; dt_TH: [T, H]; a_H: [H], negative; b_TGY, c_TGY: [T, G, Y], each for H / G heads that follow one
    another; state_SHPY: [S, H, P, Y], where each sequence starts. Returns y [T, H, P] and the states after each
    sequence's last token.
    """
    repeats = x_THP.shape[1] // b_TGY.shape[1]
    outputs, states = [], []
    for s, (row, count, _) in enumerate(queries):
        state_HPY = state_SHPY[s]
        for t in range(row, row + count):
            b_HY, c_HY = b_TGY[t].repeat_interleave(repeats, 0), c_TGY[t].repeat_interleave(repeats, 0)
            decay_H = torch.exp(dt_TH[t] * a_H)
            state_HPY = decay_H[:, None, None] * state_HPY + torch.einsum("h,hp,hy->hpy", dt_TH[t], x_THP[t], b_HY)
            outputs.append(torch.einsum("hpy,hy->hp", state_HPY, c_HY))
        states.append(state_HPY)
    return torch.stack(outputs), torch.stack(states)


@ssd.add("torch", differentiable=True)
def _ssd_as_linear_attention(
    x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGY: Tensor, c_TGY: Tensor, state_SHPY: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """Keys are B, queries C, values dt x (arXiv 2405.21060, section 7.2)."""
    decay_TH1 = (dt_TH * a_H)[..., None]
    y_THP, state_SHYP = linear_attention_in_chunks(
        c_TGY, b_TGY, dt_TH[..., None] * x_THP, decay_TH1, state_SHPY.transpose(-1, -2), queries
    )
    return y_THP, state_SHYP.transpose(-1, -2)
