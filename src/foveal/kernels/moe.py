"""Feed-forwards of the experts that tokens chose."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from foveal.kernels.dispatch import operation
from foveal.kernels.matmul import QuantisedWeight, Weight, linear

Activation = Callable[[Tensor], Tensor]
Stack = Tensor | QuantisedWeight | Sequence[Tensor]
"""A weight for each expert: stacked [E, Y, X], or one after another."""


@operation(differentiable=True)
def experts(
    x_TD: Tensor,
    weights_TA: Tensor,
    chosen_TA: Tensor,
    gate_up: Stack,
    down: Stack,
    activation: Activation,
) -> Tensor:
    """Weighted sum over the chosen experts e of down_e(act(gate_e x) * up_e x).

    x_TD: [T, D]; weights_TA: float32 [T, A]; chosen_TA: int64 [T, A]; gate_up: [2F, D] for each expert, gate rows
    first; down: [D, F] for each. Summed in float32, returned as [T, D] in x's dtype.
    """
    rows = []
    for x_D, weights_A, chosen_A in zip(x_TD, weights_TA, chosen_TA.tolist(), strict=True):
        outputs = [_expert(x_D[None], gate_up[e], down[e], activation)[0].float() for e in chosen_A]
        rows.append((torch.stack(outputs) * weights_A[:, None]).sum(0))
    return torch.stack(rows).to(x_TD)


@experts.add("torch", differentiable=True)
def _experts_grouped(
    x_TD: Tensor,
    weights_TA: Tensor,
    chosen_TA: Tensor,
    gate_up: Stack,
    down: Stack,
    activation: Activation,
) -> Tensor:
    """Tokens grouped by expert: one product for each expert that any token chose, none for the others."""
    if len(x_TD) == 1:  # nothing to group
        outputs_AD = torch.cat([_expert(x_TD, gate_up[e], down[e], activation) for e in chosen_TA[0].tolist()])
        return (weights_TA.float() @ outputs_AD.float()).to(x_TD)
    order_X = chosen_TA.flatten().argsort(stable=True)
    counts = count_choices(chosen_TA, len(gate_up)).tolist()
    token_X = order_X // chosen_TA.shape[1]
    groups = torch.split(x_TD[token_X], [count for count in counts if count])
    active = [e for e, count in enumerate(counts) if count]
    outputs = [_expert(x_gD, gate_up[e], down[e], activation) for e, x_gD in zip(active, groups, strict=True)]
    return _summed(torch.cat(outputs), weights_TA, order_X).to(x_TD)


def _accepts_at_once(
    x_TD: Tensor,
    weights_TA: Tensor,
    chosen_TA: Tensor,
    gate_up: Stack,
    down: Stack,
    activation: Activation,
) -> bool:
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return False
    narrow = all(x.dtype == torch.bfloat16 for x in (x_TD, gate_up, down))
    aligned = all(x.is_contiguous() and x.shape[-1] % 8 == 0 for x in (x_TD, gate_up, down))
    return narrow and aligned and len(x_TD) > 0


@experts.add("grouped", differentiable=True, devices=("cuda",), accepts=_accepts_at_once)
def _experts_at_once(
    x_TD: Tensor,
    weights_TA: Tensor,
    chosen_TA: Tensor,
    gate_up: Stack,
    down: Stack,
    activation: Activation,
) -> Tensor:
    """Tokens grouped by expert, and one product for all groups: their sizes stay on the device, so that the host waits
    for nothing (torch's own product does so before SM90)."""
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    order_X = chosen_TA.flatten().argsort(stable=True)
    ends_E = count_choices(chosen_TA, len(gate_up)).cumsum(0).int()
    gate_XF, up_XF = grouped_mm(x_TD[order_X // chosen_TA.shape[1]], gate_up.mT, offs=ends_E).chunk(2, -1)
    out_XD = grouped_mm(activation(gate_XF) * up_XF, down.mT, offs=ends_E)
    return _summed(out_XD, weights_TA, order_X).to(x_TD)


def _summed(outputs_XD: Tensor, weights_TA: Tensor, order_X: Tensor) -> Tensor:
    """float32 [T, D]: the weighted sums over each token's experts, whose outputs are in order_X's order."""
    weighted_XD = outputs_XD.float() * weights_TA.flatten()[order_X, None]
    # Back to token order, then a sum over each token's experts: deterministic, unlike adding in place by index.
    place_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
    return weighted_XD[place_X].unflatten(0, weights_TA.shape).sum(1)


def count_choices(chosen_TA: Tensor, experts: int) -> Tensor:
    """int64 [E]: how many tokens chose each expert. Unlike `bincount`, a GPU's host does not wait for it."""
    chosen_X = chosen_TA.flatten()
    return chosen_X.new_zeros(experts).scatter_add_(0, chosen_X, torch.ones_like(chosen_X))


def _expert(x_TD: Tensor, gate_up_FD: Weight, down_DF: Weight, activation: Activation) -> Tensor:
    gate_TF, up_TF = linear(x_TD, gate_up_FD).chunk(2, -1)
    return linear(activation(gate_TF) * up_TF, down_DF)
