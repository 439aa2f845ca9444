"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveal.nn.linear import Linear
from foveal.nn.moe import Experts
from foveal.train.parts import own_part

Schedule = Literal["wsd", "cosine", "constant"]


def learning_rate_scale(kind: Schedule, step: int, steps: int, *, warmup: int, decay: float, floor: float) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of `steps`.

    Linear warm-up over `warmup` steps; then "wsd" (warm-up, stable, decay; arXiv 2404.06395) stays at 1 and falls
    linearly to `floor` over the last share `decay` of the steps, "cosine" falls to `floor` along half a cosine, and
    "constant" stays at 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    start = warmup if kind == "cosine" else max(warmup, steps - round(decay * steps))
    share = (step - start + 1) / max(1, steps - start)
    if share <= 0:
        return 1.0
    fallen = share if kind == "wsd" else (1 - math.cos(math.pi * share)) / 2
    return 1 - (1 - floor) * min(1.0, fallen)


Directions = Callable[[Iterable[tuple[Tensor, Tensor]]], Iterator[tuple[Tensor, Tensor]]]
"""From (parameter, moment) to (parameter, direction), each parameter once, in any order."""


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal (Jordan et al. 2024, github.com/KellerJordan/Muon), for matrices, and
    for stacks of them, [..., X, Y], which torch's own Muon does not take.

    Scaled to the update size of AdamW (0.2 sqrt(max(X, Y)), arXiv 2502.16982, section 2.2), so that one learning rate
    and weight decay serve both.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        directions: Directions | None = None,
    ) -> None:
        """`directions`: how they are found where processes have parts of the matrices."""
        self._directions = directions or whole_directions
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter, direction in self._directions(self._moments(group)):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])

    def _moments(self, group: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter that has a gradient, and its Nesterov momentum."""
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                yield parameter, parameter.grad.lerp(momentum, group["momentum"])


def whole_directions(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """See `Directions`."""
    for parameter, moment in pairs:
        yield parameter, direction(moment)


def direction(moment: Tensor) -> Tensor:
    """The orthogonal matrix (for a stack: each) of the size that `Muon` says."""
    return orthogonal(moment) * (0.2 * max(moment.shape[-2:]) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of the matrix's U S V^T, for a stack of matrices each: the quintic Newton-Schulz iteration of Muon,
    in float32 on a CPU and bfloat16 elsewhere."""
    x = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def matrices(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that Muon is for: weights of linear layers and experts, not embeddings, heads, routers and
    norms."""
    found: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            found.add(module.weight)
        elif isinstance(module, Experts):
            found |= {module.gate_up_proj, module.down_proj}
    return found


class Masters:
    """float32 copies of narrower parameters, which an optimiser works on: updates would round to nothing in bfloat16.

    For parameters that are float32 (or wider) the copies are the parameters themselves. Of parameters that several
    processes share each has a copy of its own part, or that part itself: optimisers know nothing of the others.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(named)
        self.by_name = {name: _master(parameter) for name, parameter in named.items()}
        """The copies."""

    def take_gradients(self) -> list[nn.Parameter]:
        """Move every gradient to the copies; all copies."""
        for name, parameter in self._parameters.items():
            master = self.by_name[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else own_part(parameter.grad).to(master.dtype)
                parameter.grad = None
        return list(self.by_name.values())

    @torch.no_grad()
    def give_back(self) -> None:
        """Round the copies into the parameters, and forget the gradients."""
        for name, parameter in self._parameters.items():
            master = self.by_name[name]
            if master.dtype != parameter.dtype:
                own_part(parameter).copy_(master)
            master.grad = None

    def copies(self) -> Iterator[tuple[str, Tensor]]:
        """The copies that are not the parameters themselves, by name."""
        for name, master in self.by_name.items():
            if master.dtype != self._parameters[name].dtype:
                yield name, master.detach()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    part = own_part(parameter)
    if parameter.dtype in (torch.bfloat16, torch.float16):
        return nn.Parameter(part.detach().float())
    return parameter if part is parameter else nn.Parameter(part.detach())
