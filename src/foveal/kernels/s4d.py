"""S4D: a linear recurrence that is the same for every token, so that it also is a convolution."""

import torch
from torch import Tensor

from foveal.kernels.dispatch import operation
from foveal.kernels.keys import Queries

# Tokens of one convolution: memory is X Y times as many complex numbers.
_CHUNK = 256


@operation(differentiable=True)
def s4d(
    u_TX: Tensor, dt_X: Tensor, a_XY2: Tensor, c_XY2: Tensor, state_SXY2: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + (exp(dt A) - 1) / A u; y = 2 Re(C h), for each channel x of X and complex state number y of Y.

    u_TX: [T, X]; dt_X: [X], positive; a_XY2, c_XY2: [X, Y, 2], real and imaginary parts, A's real ones negative;
    state_SXY2: [S, X, Y, 2], where each sequence starts; all float32 or float64. Returns y [T, X] and the states after
    each sequence's last token. Source: arXiv 2206.11893, sections 2 and 3 (zero-order hold, B = 1).
    """
    decay_XY, input_XY, c_XY = _discrete(dt_X, a_XY2, c_XY2)
    outputs, states = [], []
    for s, (row, count, _) in enumerate(queries):
        h_XY = torch.view_as_complex(state_SXY2[s].contiguous())
        for t in range(row, row + count):
            h_XY = decay_XY * h_XY + input_XY * u_TX[t][:, None]
            outputs.append(2 * (c_XY * h_XY).real.sum(-1))
        states.append(torch.view_as_real(h_XY))
    return torch.stack(outputs), torch.stack(states)


@s4d.add("torch", differentiable=True)
def _s4d_convolved(
    u_TX: Tensor, dt_X: Tensor, a_XY2: Tensor, c_XY2: Tensor, state_SXY2: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """One token of each sequence: the recurrence. More: y = K * u + what the state still gives, chunk by chunk, with
    K[l] = 2 Re sum_y C (exp(dt A) - 1) / A exp(l dt A) and the convolution by FFT."""
    decay_XY, input_XY, c_XY = _discrete(dt_X, a_XY2, c_XY2)
    h_SXY = torch.view_as_complex(state_SXY2.contiguous())
    if queries.single:
        h_SXY = decay_XY * h_SXY + input_XY * u_TX[..., None]
        return 2 * (c_XY * h_SXY).real.sum(-1), torch.view_as_real(h_SXY)
    size = min(_CHUNK, max(queries.lengths))
    exponent_XY = dt_X[:, None] * torch.view_as_complex(a_XY2.contiguous())
    powers_XYN = torch.exp(exponent_XY[..., None] * torch.arange(size + 1, device=u_TX.device))
    kernel_XN = 2 * torch.einsum("xy,xyn->xn", c_XY * input_XY, powers_XYN[..., :size]).real
    response_XN = torch.fft.rfft(kernel_XN, 2 * size)
    outputs, states = [], []
    for s, (row, count, _) in enumerate(queries):
        h_XY = h_SXY[s]
        for u_NX in u_TX[row : row + count].split(size):
            u_XN, tokens = u_NX.T, len(u_NX)
            y_XN = torch.fft.irfft(torch.fft.rfft(u_XN, 2 * size) * response_XN, 2 * size)[:, :tokens]
            left_XN = torch.einsum("xy,xyn->xn", c_XY * h_XY, powers_XYN[..., 1 : tokens + 1]).real
            outputs.append((y_XN + 2 * left_XN).T)
            added_XY = torch.einsum("xn,xyn->xy", u_XN.to(h_XY.dtype), powers_XYN[..., :tokens].flip(-1))
            h_XY = powers_XYN[..., tokens] * h_XY + input_XY * added_XY
        states.append(torch.view_as_real(h_XY))
    return torch.cat(outputs), torch.stack(states)


def _discrete(dt_X: Tensor, a_XY2: Tensor, c_XY2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(dt A), (exp(dt A) - 1) / A and C, complex [X, Y] each."""
    a_XY, c_XY = torch.view_as_complex(a_XY2.contiguous()), torch.view_as_complex(c_XY2.contiguous())
    decay_XY = torch.exp(dt_X[:, None] * a_XY)
    return decay_XY, (decay_XY - 1) / a_XY, c_XY
