"""Mixture of experts: a router, routed experts, and a shared one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveal.config.model import MoEConfig, RouterConfig
from foveal.kernels import QuantisedWeight, experts, pack_weight, quantise_weight
from foveal.kernels.activation import ACTIVATIONS
from foveal.kernels.cpu.block_parts import Layer
from foveal.kernels.cpu.blocks import MoEBlock
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import ExactLinear
from foveal.nn.mlp import MLP
from foveal.nn.norm import RMSNorm


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to."""

    logits_TE: Tensor
    """float32, before the scoring function."""
    weights_TA: Tensor
    """float32."""
    chosen_TA: Tensor
    """int64."""


class Router(nn.Module):
    """Chooses experts for each token and weighs them (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

    def __init__(
        self, config: RouterConfig, hidden_size: int, experts: int, per_token: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config, self.per_token = config, per_token
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, dtype=dtype))
        if config.correction_bias:
            # Moved by load statistics in training, never by a gradient.
            bias = torch.zeros(experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x_TD: Tensor) -> Routing:
        """Which experts each token goes to."""
        config = self.config
        logits_TE = functional.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid() if config.scoring == "sigmoid" else logits_TE.softmax(-1)
        choice_TE = scores_TE + self.e_score_correction_bias if config.correction_bias else scores_TE
        if config.groups > 1:
            choice_TE = choice_TE.masked_fill(~self._kept(choice_TE), config.masked_score)
        chosen_TA = choice_TE.topk(self.per_token, -1).indices
        weights_TA = scores_TE.gather(1, chosen_TA)
        if config.normalise:
            # 1e-20 as in transformers: all chosen scores may be zero.
            weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits_TE, weights_TA * config.scale, chosen_TA)

    def _kept(self, choice_TE: Tensor) -> Tensor:
        """bool [T, E]: experts of the groups with the highest group score."""
        config = self.config
        grouped_TGX = choice_TE.unflatten(-1, (config.groups, -1))
        if config.group_score == "top2":
            group_TG = grouped_TGX.topk(min(2, grouped_TGX.shape[-1]), -1).values.sum(-1)
        else:
            group_TG = grouped_TGX.amax(-1)
        best_TX = group_TG.topk(config.groups_kept, -1).indices
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best_TX, True)
        return kept_TG.repeat_interleave(grouped_TGX.shape[-1], -1)


class Experts(nn.Module):
    """The routed experts' weights, stacked."""

    compute: Callable[..., Tensor] = experts
    """Replaced where processes divide the experts among them."""

    def __init__(self, experts: int, hidden_size: int, hidden: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, hidden, dtype=dtype))
        self.activation = ACTIVATIONS[activation]
        self.quantised: tuple[QuantisedWeight, QuantisedWeight] | None = None
        self._packed: tuple[list[Tensor], list[Tensor]] | None = None

    def forward(self, x_TD: Tensor, weights_TA: Tensor, chosen_TA: Tensor) -> Tensor:
        """[T, D] -> [T, D], the weighted sum over each token's experts."""
        gate_up, down = self.quantised or self._packed or (self.gate_up_proj, self.down_proj)
        return self.compute(x_TD, weights_TA, chosen_TA, gate_up, down, self.activation)

    def pack(self) -> None:
        """Trade the stacked weights for packed ones, for inference, unless compiled versions read them as they are."""
        if self.quantised is None and self.gate_up_proj.device.type == "cpu" and experts.chosen() == "torch":
            self._packed = [pack_weight(w) for w in self.gate_up_proj], [pack_weight(w) for w in self.down_proj]
            del self.gate_up_proj, self.down_proj

    def quantise(self, quantization: str) -> None:
        """Replace the weights by their "int8" or "int4" form. Raises as `quantise_weight` does."""
        gate_up = quantise_weight(self.gate_up_proj, quantization)
        self.quantised = gate_up, quantise_weight(self.down_proj, quantization)
        del self.gate_up_proj, self.down_proj

    @property
    def stacked(self) -> tuple[Tensor, Tensor] | tuple[QuantisedWeight, QuantisedWeight] | None:
        """Gate and up of all experts, and down; None once they are packed one by one."""
        return self.quantised or (None if self._packed else (self.gate_up_proj, self.down_proj))

    @property
    def rounded(self) -> tuple[QuantisedWeight, ...]:
        """The weights that `quantise` left."""
        return self.quantised or ()


class MoE(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: MoEConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Router(config.router, hidden_size, config.experts, config.per_token, dtype)
        self.experts = Experts(config.experts, hidden_size, config.hidden, config.activation, dtype)
        self.shared_experts = (
            MLP(hidden_size, config.shared_hidden, config.activation, bias=config.bias, dtype=dtype)
            if config.shared_hidden
            else None
        )
        if config.shared_gate:
            self.shared_expert_gate = ExactLinear(hidden_size, 1, dtype=dtype)
        self.config, self.gated = config, config.shared_gate

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        """[T, D] -> [T, D], and which experts were chosen."""
        routing = self.gate(x_TD)
        out_TD = self.experts(x_TD, routing.weights_TA, routing.chosen_TA)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            if self.gated:
                shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
            out_TD = out_TD + shared_TD
        return out_TD, routing

    def fused(self, norm: RMSNorm) -> MoEBlock | None:
        """The block of `norm`, this and a sum, for the kernels; None where they cannot read the experts' weights."""
        if self.experts.stacked is None or self.experts.compute is not experts:
            return None
        gate_up, down = self.experts.stacked
        shared = self.shared_experts
        return MoEBlock(
            self.config,
            norm_of(norm),
            Layer(self.gate.weight),
            self.gate.e_score_correction_bias if self.config.router.correction_bias else None,
            gate_up,
            down,
            (layer_of(shared.gate_up_proj), layer_of(shared.down_proj)) if shared is not None else None,
            layer_of(self.shared_expert_gate) if self.gated else None,
        )
