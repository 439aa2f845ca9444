"""The Triton version of `experts`, for few tokens: what it accepts."""

import torch
from torch import Tensor

from foveal.kernels.gpu.library import triton_version
from foveal.kernels.moe import Activation, Stack, experts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# With more tokens each expert's weights would be read many times over.
_MOST_TOKENS = 256


def _accepts(
    x_TD: Tensor, weights_TA: Tensor, chosen_TA: Tensor, gate_up: Stack, down: Stack, activation: Activation
) -> bool:
    stacks = all(isinstance(w, Tensor) and w.dtype == x_TD.dtype and w.is_contiguous() for w in (gate_up, down))
    return stacks and x_TD.dtype in _DTYPES and len(x_TD) <= _MOST_TOKENS and chosen_TA.dtype == torch.int64


@triton_version(experts, _accepts)
def few_tokens(
    x_TD: Tensor, weights_TA: Tensor, chosen_TA: Tensor, gate_up: Stack, down: Stack, activation: Activation
) -> Tensor:
    """`experts`, pair by pair of a token and an expert."""
    from foveal.kernels.gpu.pairs import pair_products

    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    # Pairs of one expert run one after another, so that its weights come from the card's cache.
    order_X = chosen_TA.flatten().argsort()
    launch, both_TAF = pair_products(x_TD, gate_up, chosen_TA, order_X)
    launch.run()
    gate_TAF, up_TAF = both_TAF.chunk(2, -1)
    launch, out_TAD = pair_products(activation(gate_TAF) * up_TAF, down, chosen_TA, order_X)
    launch.run()
    return (out_TAD.float() * weights_TA.float()[..., None]).sum(1).to(x_TD)
