"""Mamba-1, with Jamba's norms."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from foveal.cache.layouts import BlockCache
from foveal.config.model import MambaConfig
from foveal.kernels import causal_conv, selective_scan
from foveal.nn.linear import ExactLinear, Linear
from foveal.nn.mixer import Mixer
from foveal.nn.norm import RMSNorm
from foveal.nn.step import Step


class Convolution(nn.Module):
    """Weights of the depthwise convolution, in the checkpoint's shape [inner, 1, width]."""

    def __init__(self, inner: int, width: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, 1, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(inner, dtype=dtype)) if bias else None


class Mamba(Mixer):
    """Selective state space (arXiv 2312.00752, section 3); Jamba adds RMSNorm on dt, B and C (arXiv 2403.19887)."""

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

    def forward(
        self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None, selection_TK: Tensor | None
    ) -> Tensor:
        """See `Mixer.forward`."""
        assert selection_TK is None
        config, queries = self.config, step.queries
        conv_SWX, state_SXY = self._states(x_TD, step, cache)
        u_TX, gate_TX = self.in_proj(x_TD).chunk(2, -1)
        weight_XW = self.conv1d.weight[:, 0]
        u_TX, conv_SWX = causal_conv(u_TX, weight_XW, self.conv1d.bias, conv_SWX, queries)
        u_TX = silu(u_TX)
        dt_TR, b_TY, c_TY = self.x_proj(u_TX).split([config.dt_rank, config.state, config.state], -1)
        if config.norms:
            dt_TR, b_TY, c_TY = self.dt_layernorm(dt_TR), self.b_layernorm(b_TY), self.c_layernorm(c_TY)
        dt_TX = softplus(self.dt_proj(dt_TR).float())
        y_TX, state_SXY = selective_scan(
            u_TX.float(), dt_TX, -self.A_log.exp(), b_TY.float(), c_TY.float(), state_SXY, queries
        )
        y_TX = (y_TX + self.D * u_TX.float()) * silu(gate_TX.float())
        if cache is not None:
            assert cache.state is not None and step.batch.slots is not None
            cache.state.write(step.batch.slots.slots_out, (conv_SWX, state_SXY))
        return self.out_proj(y_TX.to(x_TD.dtype))

    def _states(self, x_TD: Tensor, step: Step, cache: BlockCache | None) -> tuple[Tensor, Tensor]:
        """Convolution inputs [S, W - 1, X] and state, float32 [S, X, Y], before each sequence's first token."""
        config, sequences = self.config, len(step.contexts.lengths)
        if cache is None:
            conv_SWX = x_TD.new_zeros(sequences, config.conv - 1, config.inner)
            state_SXY = x_TD.new_zeros(sequences, config.inner, config.state, dtype=torch.float32)
            return conv_SWX, state_SXY
        slots = step.batch.slots
        assert cache.state is not None and slots is not None
        conv_SWX, state_SXY = cache.state.read(slots.slots_in, slots.fresh)
        return conv_SWX, state_SXY
