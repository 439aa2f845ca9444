"""Mamba-2."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from foveal.config.model import Mamba2Config
from foveal.kernels import Queries, causal_conv, ssd
from foveal.kernels.activation import ACTIVATIONS
from foveal.kernels.cpu.mixer_blocks import Mamba2Block
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import Linear
from foveal.nn.norm import GroupedRMSNorm, RMSNorm
from foveal.nn.recurrent import Convolution, Recurrent


class Mamba2(Recurrent):
    """State space duality (arXiv 2405.21060, section 7): x, B, C, dt and the gate from one projection."""

    config: Mamba2Config

    def __init__(self, config: Mamba2Config, hidden_size: int, norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        inner, mixed = config.inner, config.inputs_shape[1]
        self.in_proj = Linear(hidden_size, inner + mixed + config.heads, bias=config.proj_bias, dtype=dtype)
        self.conv1d = Convolution(mixed, config.conv, bias=config.conv_bias, dtype=dtype)
        self.A_log, self.D, self.dt_bias = (
            nn.Parameter(torch.empty(config.heads, dtype=torch.float32)) for _ in range(3)
        )
        self.norm = GroupedRMSNorm(inner, config.groups, norm_eps, dtype=dtype)
        self.out_proj = Linear(inner, hidden_size, bias=config.proj_bias, dtype=dtype)

    def recur(
        self, x_TD: Tensor, inputs_SWX: Tensor, state_S: Tensor, queries: Queries
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Recurrent.recur`."""
        config = self.config
        inner, shared = config.inner, config.groups * config.state
        gate_TX, mixed_TX, dt_TH = self.in_proj(x_TD).split([inner, inner + 2 * shared, config.heads], -1)
        mixed_TX, inputs_SWX = causal_conv(mixed_TX, self.conv1d.weight[:, 0], self.conv1d.bias, inputs_SWX, queries)
        x_TX, b_TX, c_TX = ACTIVATIONS[config.activation](mixed_TX).float().split([inner, shared, shared], -1)
        x_THP, b_TGY, c_TGY = (
            part.unflatten(-1, (count, -1))
            for part, count in ((x_TX, config.heads), (b_TX, config.groups), (c_TX, config.groups))
        )
        dt_TH = softplus(dt_TH.float() + self.dt_bias)
        if config.dt_limits:
            dt_TH = dt_TH.clamp(*config.dt_limits)
        y_THP, state_S = ssd(x_THP, dt_TH, -self.A_log.exp(), b_TGY, c_TGY, state_S, queries)
        y_TX = (y_THP + self.D[:, None] * x_THP).flatten(1) * silu(gate_TX.float())
        return self.out_proj(self.norm(y_TX).to(x_TD.dtype)), inputs_SWX, state_S

    def fused(self, norm: RMSNorm) -> Mamba2Block:
        """The block of `norm`, this and a sum, for the kernels."""
        assert norm.eps == self.norm.eps
        projections = layer_of(self.in_proj), layer_of(self.out_proj)
        conv = self.conv1d.fused(self.config.activation)
        a_H = -self.A_log.detach().exp()
        own = norm_of(self.norm)
        return Mamba2Block(self.config, norm_of(norm), projections, conv, a_H, self.D, self.dt_bias, own)
