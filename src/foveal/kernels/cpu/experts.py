"""The experts of a mixture in one call (csrc/kernels/experts.cpp)."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled
from foveal.kernels.cpu.linear import takes_weight, weight_arguments
from foveal.kernels.matmul import QuantisedWeight
from foveal.kernels.moe import Activation, Stack, experts


def _accepts(
    x_TD: Tensor, weights_TA: Tensor, chosen_TA: Tensor, gate_up: Stack, down: Stack, activation: Activation
) -> bool:
    return (
        activation is silu
        and x_TD.dtype in DTYPES
        and x_TD.shape[1] > 0
        and x_TD.stride(1) == 1
        and _is_stack(gate_up, x_TD.dtype)
        and _is_stack(down, x_TD.dtype)
        and type(gate_up) is type(down)
        and weights_TA.dtype == torch.float32
        and weights_TA.is_contiguous()
        and chosen_TA.dtype == torch.int64
        and chosen_TA.is_contiguous()
    )


def _is_stack(stack: Stack, dtype: torch.dtype) -> bool:
    return isinstance(stack, Tensor | QuantisedWeight) and takes_weight(stack, dtype, 3) and stack.shape[2] > 0


@compiled(experts, _accepts)
def _experts(
    kernels: Kernels,
    x_TD: Tensor,
    weights_TA: Tensor,
    chosen_TA: Tensor,
    gate_up: Stack,
    down: Stack,
    activation: Activation,
) -> Tensor:
    assert isinstance(gate_up, Tensor | QuantisedWeight) and isinstance(down, Tensor | QuantisedWeight)
    tokens, hidden_size = x_TD.shape
    count, hidden = gate_up.shape[0], down.shape[2]
    if tuple(gate_up.shape) != (count, 2 * hidden, hidden_size) or tuple(down.shape) != (count, hidden_size, hidden):
        raise ValueError(
            f"gate_up {list(gate_up.shape)} and down {list(down.shape)} do not fit x {list(x_TD.shape)} and each other"
        )
    if weights_TA.shape != chosen_TA.shape or len(weights_TA) != tokens:
        raise ValueError(
            f"weights {list(weights_TA.shape)} and chosen {list(chosen_TA.shape)} do not fit {tokens} tokens"
        )
    out_TD = torch.empty(tokens, hidden_size, dtype=x_TD.dtype)
    kernels.run.experts(
        address(x_TD),
        x_TD.stride(0),
        address(weights_TA),
        address(chosen_TA),
        weight_arguments(gate_up),
        weight_arguments(down),
        count,
        address(out_TD),
        tokens,
        chosen_TA.shape[1],
        FORMATS[x_TD.dtype],
        torch.get_num_threads(),
    )
    return out_TD
