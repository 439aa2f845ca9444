"""Mamba-1, with Jamba's norms."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from foveal.config.model import MambaConfig
from foveal.kernels import Queries, causal_conv, selective_scan
from foveal.kernels.activation import ACTIVATIONS
from foveal.kernels.cpu.mixer_blocks import MambaBlock
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import ExactLinear, Linear
from foveal.nn.norm import RMSNorm
from foveal.nn.recurrent import Convolution, Recurrent


class Mamba(Recurrent):
    """Selective state space (arXiv 2312.00752, section 3); Jamba adds RMSNorm on dt, B and C (arXiv 2403.19887)."""

    config: MambaConfig

    def __init__(self, config: MambaConfig, hidden_size: int, norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        inner, state, rank = config.inner, config.state, config.dt_rank
        self.in_proj = Linear(hidden_size, 2 * inner, bias=config.proj_bias, dtype=dtype)
        self.conv1d = Convolution(inner, config.conv, bias=config.conv_bias, dtype=dtype)
        self.x_proj = ExactLinear(inner, rank + 2 * state, dtype=dtype)
        self.dt_proj = ExactLinear(rank, inner, bias=True, dtype=dtype)
        self.A_log = nn.Parameter(torch.empty(inner, state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.out_proj = Linear(inner, hidden_size, bias=config.proj_bias, dtype=dtype)
        if config.norms:
            self.dt_layernorm = RMSNorm(rank, norm_eps, dtype=dtype)
            self.b_layernorm = RMSNorm(state, norm_eps, dtype=dtype)
            self.c_layernorm = RMSNorm(state, norm_eps, dtype=dtype)

    def recur(
        self, x_TD: Tensor, inputs_SWX: Tensor, state_S: Tensor, queries: Queries
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Recurrent.recur`."""
        config = self.config
        u_TX, gate_TX = self.in_proj(x_TD).chunk(2, -1)
        u_TX, inputs_SWX = causal_conv(u_TX, self.conv1d.weight[:, 0], self.conv1d.bias, inputs_SWX, queries)
        u_TX = ACTIVATIONS[config.activation](u_TX)
        dt_TR, b_TY, c_TY = self.x_proj(u_TX).split([config.dt_rank, config.state, config.state], -1)
        if config.norms:
            dt_TR, b_TY, c_TY = self.dt_layernorm(dt_TR), self.b_layernorm(b_TY), self.c_layernorm(c_TY)
        dt_TX = softplus(self.dt_proj(dt_TR).float())
        y_TX, state_S = selective_scan(
            u_TX.float(), dt_TX, -self.A_log.exp(), b_TY.float(), c_TY.float(), state_S, queries
        )
        y_TX = (y_TX + self.D * u_TX.float()) * silu(gate_TX.float())
        return self.out_proj(y_TX.to(x_TD.dtype)), inputs_SWX, state_S

    def fused(self, norm: RMSNorm) -> MambaBlock:
        """The block of `norm`, this and a sum, for the kernels."""
        projections = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        into, x, dt, out = map(layer_of, projections)
        norms = None
        if self.config.norms:
            norms = norm_of(self.dt_layernorm), norm_of(self.b_layernorm), norm_of(self.c_layernorm)
        conv = self.conv1d.fused(self.config.activation)
        a_XY = -self.A_log.detach().exp()
        return MambaBlock(self.config, norm_of(norm), (into, x, dt, out), conv, a_XY, self.D, norms)
