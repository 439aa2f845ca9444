"""Kimi Delta Attention."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from foveal.config.model import KDAConfig
from foveal.kernels import Queries, causal_conv, delta_rule
from foveal.kernels.activation import ACTIVATIONS
from foveal.kernels.cpu.mixer_blocks import DeltaBlock
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import ExactLinear, FusedLinear, Linear
from foveal.nn.norm import RMSNorm
from foveal.nn.recurrent import FusedConvolution, Recurrent, unit


class KDA(Recurrent):
    """The delta rule with a decay for each key dimension (Kimi Linear report, arXiv 2510.26692, section 3)."""

    config: KDAConfig

    def __init__(self, config: KDAConfig, hidden_size: int, norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.heads, config.head_dim
        inner = heads * dim
        self.qkv_proj = FusedLinear(hidden_size, {f"{name}_proj": inner for name in "qkv"}, dtype=dtype)
        self.qkv_conv1d = FusedConvolution({f"{name}_conv1d": inner for name in "qkv"}, config.conv, dtype=dtype)
        self.f_a_proj = ExactLinear(hidden_size, dim, dtype=dtype)
        self.f_b_proj = ExactLinear(dim, inner, dtype=dtype)
        self.b_proj = ExactLinear(hidden_size, heads, dtype=dtype)
        self.g_a_proj = Linear(hidden_size, dim, dtype=dtype)
        self.g_b_proj = Linear(dim, inner, dtype=dtype)
        self.A_log = nn.Parameter(torch.empty(1, 1, heads, 1, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.o_norm = RMSNorm(dim, norm_eps, dtype=dtype)
        self.o_proj = Linear(inner, hidden_size, dtype=dtype)

    def recur(
        self, x_TD: Tensor, inputs_SWX: Tensor, state_S: Tensor, queries: Queries
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Recurrent.recur`."""
        heads, dim = self.config.heads, self.config.head_dim
        qkv_TX, inputs_SWX = causal_conv(self.qkv_proj(x_TD), self.qkv_conv1d.weight[:, 0], None, inputs_SWX, queries)
        qkv_TX = ACTIVATIONS[self.config.activation](qkv_TX).float()
        q_THP, k_THP, v_THP = qkv_TX.unflatten(-1, (3, heads, dim)).unbind(1)
        dt_THP = softplus(self.f_b_proj(self.f_a_proj(x_TD)).float() + self.dt_bias).unflatten(-1, (heads, dim))
        decay_THP = -self.A_log[0].exp() * dt_THP
        beta_TH = self.b_proj(x_TD).float().sigmoid()
        q_THP, k_THP = unit(q_THP) * dim**-0.5, unit(k_THP)
        o_THP, state_S = delta_rule(q_THP, k_THP, v_THP, decay_THP, beta_TH, state_S, queries)
        gate_THP = self.g_b_proj(self.g_a_proj(x_TD)).float().sigmoid().unflatten(-1, (heads, dim))
        o_THP = self.o_norm(o_THP.to(x_TD.dtype)) * gate_THP
        return self.o_proj(o_THP.to(x_TD.dtype).flatten(1)), inputs_SWX, state_S

    def fused(self, norm: RMSNorm) -> DeltaBlock:
        """The block of `norm`, this and a sum, for the kernels."""
        assert norm.eps == self.o_norm.eps
        projections = layer_of(self.qkv_proj), layer_of(self.b_proj), layer_of(self.o_proj)
        f_a, f_b, g_a, g_b = map(layer_of, (self.f_a_proj, self.f_b_proj, self.g_a_proj, self.g_b_proj))
        conv = self.qkv_conv1d.fused(self.config.activation)
        a_H = -self.A_log.detach().exp().flatten()
        own = norm_of(self.o_norm)
        return DeltaBlock(self.config, norm_of(norm), projections, (f_a, f_b, g_a, g_b), conv, a_H, self.dt_bias, own)
