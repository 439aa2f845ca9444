"""Expert parallelism: each process of a group keeps some of the experts, and tokens travel to theirs and back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from foveal.kernels import experts
from foveal.kernels.moe import Activation, Stack
from foveal.train.parallel.collectives import exchange


class DispatchedExperts:
    """`foveal.kernels.experts`, called by all ranks of a group with their own tokens; rank r has the r-th part of the
    experts' weights. The results are those of one process with all weights, whatever the group's size."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(
        self,
        x_TD: Tensor,
        weights_TA: Tensor,
        chosen_TA: Tensor,
        gate_up: Stack,
        down: Stack,
        activation: Activation,
    ) -> Tensor:
        """Tokens are sorted by expert, which also sorts them by rank; ranks tell each other how many come for each of
        their experts, and then send them."""
        own_gate_up, own_down = (_own(stack) for stack in (gate_up, down))
        order_X = chosen_TA.flatten().argsort(stable=True)
        counts_RE = torch.bincount(chosen_TA.flatten(), minlength=len(own_down) * self._group.size())
        counts_RE = counts_RE.view(self._group.size(), -1)
        coming_RE = torch.empty_like(counts_RE)
        dist.all_to_all_single(coming_RE, counts_RE, group=self._group)
        sent, received = counts_RE.sum(1).tolist(), coming_RE.sum(1).tolist()
        rows_YD = exchange(x_TD[order_X // chosen_TA.shape[1]], sent, received, self._group)
        expert_Y = (
            torch.arange(len(own_down), device=x_TD.device).repeat(len(sent)).repeat_interleave(coming_RE.flatten())
        )
        rows_YD = _each_by_its_expert(rows_YD, expert_Y, own_gate_up, own_down, activation)
        rows_XD = exchange(rows_YD, received, sent, self._group)
        # From here on as the kernel itself goes on.
        weighted_XD = rows_XD.float() * weights_TA.flatten()[order_X, None]
        place_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
        return weighted_XD[place_X].unflatten(0, chosen_TA.shape).sum(1).to(x_TD)


def _own(stack: Stack) -> Tensor:
    assert isinstance(stack, DTensor), "experts are not sharded"
    return stack.to_local()


def _each_by_its_expert(
    rows_YD: Tensor, expert_Y: Tensor, gate_up: Sequence[Tensor] | Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """[Y, D], each row's own expert applied to it.

    One row of zeros more: without any row the weights would have no gradient, and sharded ones need one on every rank.
    """
    rows_YD = torch.cat((rows_YD, rows_YD.new_zeros(1, rows_YD.shape[1])))
    expert_Y1 = torch.cat((expert_Y, expert_Y.new_zeros(1)))[:, None]
    ones_Y1 = torch.ones_like(expert_Y1, dtype=torch.float32)
    return experts(rows_YD, ones_Y1, expert_Y1, gate_up, down, activation)[:-1]
