"""The gated delta rule."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from foveal.config.model import GatedDeltaConfig
from foveal.kernels import Queries, causal_conv, delta_rule
from foveal.kernels.activation import ACTIVATIONS
from foveal.kernels.cpu.mixer_blocks import DeltaBlock
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import ExactLinear, Linear
from foveal.nn.norm import RMSNorm
from foveal.nn.recurrent import Convolution, Recurrent, unit


class GatedDelta(Recurrent):
    """Gated DeltaNet (arXiv 2412.06464, section 3.4) with grouped key heads, as in Qwen3-Next."""

    config: GatedDeltaConfig

    def __init__(self, config: GatedDeltaConfig, hidden_size: int, norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        mixed, values = config.inputs_shape[1], config.heads * config.value_dim
        self.in_proj_qkvz = Linear(hidden_size, mixed + values, dtype=dtype)
        self.in_proj_ba = ExactLinear(hidden_size, 2 * config.heads, dtype=dtype)
        self.conv1d = Convolution(mixed, config.conv, bias=False, dtype=dtype)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(config.heads, dtype=torch.float32)) for _ in range(2))
        self.norm = RMSNorm(config.value_dim, norm_eps, dtype=dtype)
        self.out_proj = Linear(values, hidden_size, dtype=dtype)

    def recur(
        self, x_TD: Tensor, inputs_SWX: Tensor, state_S: Tensor, queries: Queries
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Recurrent.recur`."""
        config = self.config
        mixed_TX, z_THV, beta_TH, dt_TH = self._project(x_TD)
        mixed_TX, inputs_SWX = causal_conv(mixed_TX, self.conv1d.weight[:, 0], None, inputs_SWX, queries)
        keys = config.key_heads * config.key_dim
        mixed_TX = ACTIVATIONS[config.activation](mixed_TX).float()
        q_TX, k_TX, v_TX = mixed_TX.split([keys, keys, config.heads * config.value_dim], -1)
        q_TGP, k_TGP = (unit(part_TX.unflatten(-1, (config.key_heads, -1))) for part_TX in (q_TX, k_TX))
        v_THV = v_TX.unflatten(-1, (config.heads, -1))
        decay_TH1 = (-self.A_log.exp() * softplus(dt_TH.float() + self.dt_bias))[..., None]
        o_THV, state_S = delta_rule(
            q_TGP * config.key_dim**-0.5, k_TGP, v_THV, decay_TH1, beta_TH.float().sigmoid(), state_S, queries
        )
        o_THV = self.norm(o_THV.to(x_TD.dtype)) * silu(z_THV.float())
        return self.out_proj(o_THV.to(x_TD.dtype).flatten(1)), inputs_SWX, state_S

    def fused(self, norm: RMSNorm) -> DeltaBlock:
        """The block of `norm`, this and a sum, for the kernels."""
        assert norm.eps == self.norm.eps
        projections = layer_of(self.in_proj_qkvz), layer_of(self.in_proj_ba), layer_of(self.out_proj)
        conv = self.conv1d.fused(self.config.activation)
        a_H = -self.A_log.detach().exp()
        own = norm_of(self.norm)
        return DeltaBlock(self.config, norm_of(norm), projections, None, conv, a_H, self.dt_bias, own)

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the convolution reads, [T, X]; output gates, [T, H, V]; learning rates and time steps, [T, H] each. In
        the checkpoint's projections they stand side by side for each key head."""
        config = self.config
        served = config.heads // config.key_heads
        widths = [config.key_dim] * 2 + [served * config.value_dim] * 2
        q, k, v, z = self.in_proj_qkvz(x_TD).unflatten(-1, (config.key_heads, -1)).split(widths, -1)
        beta, dt = self.in_proj_ba(x_TD).unflatten(-1, (config.key_heads, 2, served)).unbind(2)
        mixed_TX = torch.cat([part.flatten(1) for part in (q, k, v)], -1)
        return mixed_TX, z.flatten(1).unflatten(-1, (config.heads, -1)), beta.flatten(1), dt.flatten(1)
