"""All residual blocks, x + operation(norm(x)), that compiled kernels take; here those that do not mix tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.config.model import MoEConfig
from foveal.kernels.cpu.activation import COMPILED
from foveal.kernels.cpu.block_parts import Layer, Norm, layer_arguments, norm_arguments, readable
from foveal.kernels.cpu.library import Kernels, address
from foveal.kernels.cpu.linear import takes_weight, weight_arguments
from foveal.kernels.cpu.mixer_blocks import DeltaBlock, GQABlock, Mamba2Block, MambaBlock, MLABlock
from foveal.kernels.matmul import QuantisedWeight


@dataclass(frozen=True)
class MLPBlock:
    """x + down(act(gate(norm(x))) * up(norm(x)))."""

    norm: Norm
    gate_up: Layer
    down: Layer
    activation: str

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        return self.activation in COMPILED and readable([self.norm], [self.gate_up, self.down])

    def native(self, kernels: Kernels) -> Any:
        """`MlpBlock` of csrc/kernels/block.h."""
        hidden, inner = self.down.weight.shape
        assert self.gate_up.weight.shape == (2 * inner, hidden) and hidden == len(self.norm.weight_X)
        return kernels.run.MlpBlock(
            norm_arguments(self.norm),
            layer_arguments(self.gate_up),
            layer_arguments(self.down),
            COMPILED[self.activation],
        )


@dataclass(frozen=True)
class MoEBlock:
    """x + experts(norm(x)).

    router: [E, D]; bias_E: float32, for choosing only; gate_up, down: the stacked weights; shared: gate and up, and
    down, of the expert for all tokens; shared_gate: [1, D], what it is multiplied by.
    """

    config: MoEConfig
    norm: Norm
    router: Layer
    bias_E: Tensor | None
    gate_up: Tensor | QuantisedWeight
    down: Tensor | QuantisedWeight
    shared: tuple[Layer, Layer] | None
    shared_gate: Layer | None

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        dtype = self.norm.weight_X.dtype
        stacks = type(self.gate_up) is type(self.down) and all(
            takes_weight(stack, dtype, 3) for stack in (self.gate_up, self.down)
        )
        bias = self.bias_E is None or (self.bias_E.dtype == torch.float32 and self.bias_E.is_contiguous())
        layers = [self.router, *(self.shared or ()), *([self.shared_gate] if self.shared_gate else [])]
        router, experts = self.config.router, self.config.experts
        groups = experts % router.groups == 0 and router.groups_kept <= router.groups  # else the plain form complains
        return self.config.activation == "silu" and groups and stacks and bias and readable([self.norm], layers)

    def native(self, kernels: Kernels) -> Any:
        """`MoeBlock` of csrc/kernels/block.h."""
        config, router = self.config, self.config.router
        shared_gate_up, shared_down = self.shared or (None, None)
        return kernels.run.MoeBlock(
            norm_arguments(self.norm),
            (
                *(weight_arguments(self.router.weight), address(self.bias_E), router.scoring == "sigmoid"),
                *(router.normalise, router.scale, router.groups, router.groups_kept),
                *(router.group_score == "top2", router.masked_score),
            ),
            weight_arguments(self.gate_up),
            weight_arguments(self.down),
            config.experts,
            config.per_token,
            [layer_arguments(layer) for layer in (shared_gate_up, shared_down, self.shared_gate)],
        )


MixerBlock = GQABlock | MLABlock | MambaBlock | Mamba2Block | DeltaBlock
AnyBlock = MixerBlock | MLPBlock | MoEBlock
