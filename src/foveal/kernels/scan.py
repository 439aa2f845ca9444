"""Recurrences over tokens: Mamba's causal convolution and selective scan, packed, each sequence from its own state."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from foveal.kernels.dispatch import operation
from foveal.kernels.keys import Queries
from foveal.kernels.rounds import in_rounds

# States of a chunk, [S, N, X, Y]: more leave the cache, fewer are not worth the calls.
CHUNK_NUMBERS = 1 << 21
LEAST_CHUNK, MOST_CHUNK = 16, 1024


@operation(differentiable=True)
def selective_scan(
    u_TX: Tensor, dt_TX: Tensor, a_XY: Tensor, b_TY: Tensor, c_TY: Tensor, state_SXY: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt B u; y = C h, for each inner channel x of X and state number y of Y (float32 throughout).

    u_TX, dt_TX: [T, X]; a_XY: [X, Y], negative; b_TY, c_TY: [T, Y]; state_SXY: [S, X, Y], where each sequence starts.
    Returns y [T, X] and the states after each sequence's last token. Source: arXiv 2312.00752, `selective_scan_ref`.
    """
    outputs, states = [], []
    for s, (row, count, _) in enumerate(queries):
        state_XY = state_SXY[s]
        for t in range(row, row + count):
            decay_XY = torch.exp(dt_TX[t][:, None] * a_XY)
            state_XY = decay_XY * state_XY + (dt_TX[t] * u_TX[t])[:, None] * b_TY[t]
            outputs.append(state_XY @ c_TY[t])
        states.append(state_XY)
    return torch.stack(outputs), torch.stack(states)


@selective_scan.add("torch", differentiable=True)
def _scan_in_chunks(
    u_TX: Tensor, dt_TX: Tensor, a_XY: Tensor, b_TY: Tensor, c_TY: Tensor, state_SXY: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    size = min(max(CHUNK_NUMBERS // max(state_SXY.numel(), 1), LEAST_CHUNK), MOST_CHUNK)
    return in_rounds(partial(_chunk, a_XY), (dt_TX * u_TX, dt_TX, b_TY, c_TY), state_SXY, queries, size)


def _chunk(a_XY: Tensor, inputs: Sequence[Tensor], state_SXY: Tensor) -> tuple[Tensor, Tensor]:
    """N tokens of S sequences at a time, dt u, dt, B and C [S, N, ...], in about 2 sqrt(N) steps: K pieces of M tokens
    go side by side, each from a state of zeros; then what each began with is added, decayed by exp(A times the sum of
    dt since then). Nothing is divided by a decay, so none can vanish."""
    count = inputs[0].shape[1]
    length = math.ceil(math.sqrt(count))
    pieces = -(-count // length)
    input_SKMX, dt_SKMX, b_SKMY, c_SKMY = (
        pad(x, (0, 0, 0, pieces * length - count)).unflatten(1, (pieces, length)) for x in inputs
    )
    decay_SKMXY = torch.exp(dt_SKMX[..., None] * a_XY)
    new_SKMXY = input_SKMX[..., None] * b_SKMY[..., None, :]
    h_SKXY = torch.zeros_like(new_SKMXY[:, :, 0])
    from_zeros, beginnings = [], []
    for decay_SKXY, new_SKXY in zip(decay_SKMXY.unbind(2), new_SKMXY.unbind(2), strict=True):
        h_SKXY = torch.addcmul(new_SKXY, decay_SKXY, h_SKXY)
        from_zeros.append(h_SKXY)
    since_SKMXY = torch.exp(dt_SKMX.cumsum(2)[..., None] * a_XY)
    for end_SXY, decay_SXY in zip(h_SKXY.unbind(1), since_SKMXY[:, :, -1].unbind(1), strict=True):
        beginnings.append(state_SXY)
        state_SXY = torch.addcmul(end_SXY, decay_SXY, state_SXY)
    h_SKMXY = torch.addcmul(torch.stack(from_zeros, 2), since_SKMXY, torch.stack(beginnings, 1)[:, :, None])
    y_SKMX = (h_SKMXY @ c_SKMY[..., None])[..., 0]
    return y_SKMX.flatten(1, 2)[:, :count], state_SXY


@selective_scan.add("loop", differentiable=False, devices=("cpu",))
def _scan_side_by_side(
    u_TX: Tensor, dt_TX: Tensor, a_XY: Tensor, b_TY: Tensor, c_TY: Tensor, state_SXY: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """Sequences side by side, token by token: the fewest passes over memory; gradients would cost it dear."""
    lengths = queries.lengths
    longest_first = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    first_S = torch.tensor([queries.offsets[s] for s in longest_first], device=u_TX.device)
    input_TX = dt_TX * u_TX
    state_SXY = state_SXY[longest_first]
    finished: list[Tensor] = []
    outputs, rows = [], []
    for t in range(max(lengths)):
        active = sum(length > t for length in lengths)
        finished.extend(reversed(state_SXY[active:].unbind(0)))
        row_s = first_S[:active] + t
        decay_sXY = torch.exp(dt_TX[row_s][..., None] * a_XY)
        state_SXY = decay_sXY * state_SXY[:active] + input_TX[row_s][..., None] * b_TY[row_s][:, None]
        outputs.append((state_SXY @ c_TY[row_s][..., None])[..., 0])
        rows.append(row_s)
    finished.extend(reversed(state_SXY.unbind(0)))
    row_T = torch.cat(rows)
    y_TX = torch.cat(outputs)[row_T.argsort()]
    order = [0] * len(lengths)
    for place, s in enumerate(reversed(longest_first)):
        order[s] = place
    return y_TX, torch.stack([finished[place] for place in order])


@operation(differentiable=True)
def causal_conv(
    x_TX: Tensor, weight_XW: Tensor, bias_X: Tensor | None, state_SWX: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over each sequence's own past: y(t) = sum_w weight(:, w) x(t - W + 1 + w) + bias.

    x_TX: [T, X]; weight_XW: [X, W]; state_SWX: [S, W - 1, X], the inputs before the first token, oldest first.
    Returns y [T, X] and the last W - 1 inputs of each sequence.
    """
    outputs, states = [], []
    for s, (row, count, _) in enumerate(queries):
        past_NX = torch.cat((state_SWX[s], x_TX[row : row + count]))
        for t in range(count):
            outputs.append((past_NX[t : t + weight_XW.shape[1]] * weight_XW.T).sum(0))
        states.append(past_NX[count:])
    y_TX = torch.stack(outputs)
    return (y_TX if bias_X is None else y_TX + bias_X), torch.stack(states)


@causal_conv.add("torch", differentiable=True)
def _causal_conv_grouped(
    x_TX: Tensor, weight_XW: Tensor, bias_X: Tensor | None, state_SWX: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    if queries.single:
        window_SWX = torch.cat((state_SWX, x_TX[:, None]), 1)
        y_SX = (window_SWX * weight_XW.T).sum(1)
        return (y_SX if bias_X is None else y_SX + bias_X), window_SWX[:, 1:]
    outputs, states = [], []
    for s, (start, stop) in enumerate(pairwise(queries.offsets)):
        past_NX = torch.cat((state_SWX[s], x_TX[start:stop]))
        y_XN = conv1d(past_NX.T[None], weight_XW[:, None], bias_X, groups=weight_XW.shape[0])[0]
        outputs.append(y_XN.T)
        states.append(past_NX[stop - start :])
    return torch.cat(outputs), torch.stack(states)
