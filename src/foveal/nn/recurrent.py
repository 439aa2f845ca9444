"""What every recurrent mixer is: a short convolution, and a state that each token changes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from foveal.cache.layouts import BlockCache
from foveal.config.model import RecurrentConfig
from foveal.kernels import Queries
from foveal.kernels.cpu.mixer_blocks import ConvPart
from foveal.nn.mixer import Mixer
from foveal.nn.step import Step


class Recurrent(Mixer):
    """Base of the recurrent mixers: reads and writes what a sequence carries from step to step."""

    config: RecurrentConfig

    def recur(
        self, x_TD: Tensor, inputs_SWX: Tensor, state_S: Tensor, queries: Queries
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> [T, D], from the convolution's last inputs and the state of each sequence; and both afterwards.

        inputs_SWX: [S, *config.inputs_shape] in x's dtype; state_S: float32 [S, *config.state_shape].
        """
        raise NotImplementedError

    def forward(
        self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None, selection_TK: Tensor | None
    ) -> Tensor:
        """See `Mixer.forward`."""
        assert selection_TK is None
        if cache is None:
            sequences = len(step.contexts.lengths)
            inputs_SWX = x_TD.new_zeros(sequences, *self.config.inputs_shape)
            state_S = x_TD.new_zeros(sequences, *self.config.state_shape, dtype=torch.float32)
            return self.recur(x_TD, inputs_SWX, state_S, step.queries)[0]
        slots = step.batch.slots
        assert cache.state is not None and slots is not None
        inputs_SWX, state_S = cache.state.read(slots)
        out_TD, *states = self.recur(x_TD, inputs_SWX, state_S, step.queries)
        cache.state.write(slots, states)
        return out_TD


class Convolution(nn.Module):
    """Weights of the depthwise convolution, in the checkpoint's shape [inner, 1, width]."""

    def __init__(self, inner: int, width: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, 1, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(inner, dtype=dtype)) if bias else None

    def fused(self, activation: str) -> ConvPart:
        """This and its activation, for the kernels."""
        return ConvPart(self.weight, self.bias, activation)


class FusedConvolution(Convolution):
    """Convolutions over channels that stand side by side, as one; `parts` names them and their channels, in order."""

    def __init__(self, parts: Mapping[str, int], width: int, *, dtype: torch.dtype) -> None:
        super().__init__(sum(parts.values()), width, bias=False, dtype=dtype)
        self.parts = dict(parts)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension: keys and queries of the delta rule."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
