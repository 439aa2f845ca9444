"""The parameters that a stage teaches, and how they are updated."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveal.models.decoder import Decoder, Embedding
from foveal.nn.indexer import Indexer
from foveal.train.optim import Masters, Muon, learning_rate_scale, matrices
from foveal.train.parallel import Parallel
from foveal.train.parts import as_part_of
from foveal.train.schema import StageSettings
from foveal.train.stages import KINDS


class Learner:
    """Optimisers over the parameters of one stage; all others are frozen."""

    def __init__(self, decoder: Decoder, stage: StageSettings, parallel: Parallel | None = None) -> None:
        """`parallel`: the processes that share the decoder; None: this one alone."""
        self.stage, self._parallel = stage, parallel or Parallel()
        indexers = indexer_parameters(decoder)
        self._freeze(decoder, indexers)
        named = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
        assert named
        self._learned = named
        self._masters = Masters(named)
        self.optimizers = self._optimizers(decoder, named, indexers)

    def _freeze(self, decoder: Decoder, indexers: set[nn.Parameter]) -> None:
        learns = self.stage.learns or KINDS[self.stage.kind].learns
        buffers = {p for name, p in decoder.named_parameters() if name.endswith("e_score_correction_bias")}
        for parameter in decoder.parameters():
            wanted = learns == "all" or (parameter in indexers) == (learns == "indexer")
            parameter.requires_grad_(wanted and parameter not in buffers)

    def _optimizers(
        self, decoder: Decoder, named: dict[str, nn.Parameter], indexers: set[nn.Parameter]
    ) -> list[torch.optim.Optimizer]:
        stage = self.stage
        by_muon = matrices(decoder) if stage.optimizer == "muon" else set()
        undecayed = {m.weight for m in decoder.modules() if isinstance(m, Embedding)}
        muon: list[dict[str, Any]] = []
        adamw: list[dict[str, Any]] = []
        for own, rate in ((False, stage.learning_rate), (True, stage.indexer_learning_rate or stage.learning_rate)):
            part = {name: p for name, p in named.items() if (p in indexers) == own}
            groups = {
                "muon": [name for name, p in part.items() if p in by_muon],
                "decayed": [name for name, p in part.items() if p not in by_muon | undecayed and p.dim() > 1],
            }
            groups["plain"] = [name for name in part if name not in groups["muon"] + groups["decayed"]]
            for kind, names in groups.items():
                params = [self._masters.by_name[name] for name in names]
                decay = 0.0 if kind == "plain" else stage.weight_decay
                group = {"params": params, "lr": rate, "highest": rate, "weight_decay": decay}
                if params:
                    (muon if kind == "muon" else adamw).append(group)
        optimizers: list[torch.optim.Optimizer] = []
        if muon:
            shapes: dict[Tensor, torch.Size] = {self._masters.by_name[name]: p.shape for name, p in named.items()}
            optimizers.append(Muon(muon, directions=self._parallel.directions(shapes)))
        if adamw:
            optimizers.append(torch.optim.AdamW(adamw, betas=(0.9, stage.beta2), eps=1e-10))
        return optimizers

    def update(self, step: int, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """One update from the gradients that were collected, which are then forgotten. What to log, `losses` (scalars
        on the device) among it: here, once, the host waits for all that the device had to do."""
        stage = self.stage
        scale = learning_rate_scale(
            *(stage.schedule, step, stage.steps),
            warmup=stage.warmup_steps,
            decay=stage.decay_share,
            floor=stage.final_share,
        )
        parameters = self._masters.take_gradients()
        norm = self._parallel.clip(parameters, stage.clip or float("inf"))
        values = _read({**losses, "gradient_norm": norm})
        if not math.isfinite(values["gradient_norm"]):
            raise FloatingPointError(
                f"the gradient at step {step} of this {stage.kind} stage is {values['gradient_norm']}: "
                "try a lower learning_rate"
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * scale
            optimizer.step()
        self._masters.give_back()
        return {**values, "learning_rate": stage.learning_rate * scale}

    def tensors(self) -> dict[str, Tensor]:
        """What the optimisers remember, for a checkpoint; the tensors themselves, to be overwritten by one."""
        self._remember()
        tensors = {f"master.{name}": as_part_of(copy, self._learned[name]) for name, copy in self._masters.copies()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._masters.by_name.items()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                name = names[parameter]
                for what, value in state.items():
                    tensors[f"optimizer.{name}.{what}"] = as_part_of(value, self._learned[name])
        return tensors

    def _remember(self) -> None:
        """Make the optimisers' state where there is none yet, as before the first update."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter not in optimizer.state:
                        optimizer.state[parameter] = dict(_first_state(optimizer, parameter))


def _read(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers, by one copy from the device."""
    return dict(zip(scalars, torch.stack([x.double() for x in scalars.values()]).tolist(), strict=True))


def _first_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    if isinstance(optimizer, Muon):
        yield "momentum", torch.zeros_like(parameter)
        return
    yield "step", torch.tensor(0.0)  # on the CPU whatever the device, as torch has it: it becomes part of a factor
    yield "exp_avg", torch.zeros_like(parameter)
    yield "exp_avg_sq", torch.zeros_like(parameter)


def teaches_base(stage: StageSettings) -> bool:
    """Whether anything but indexers learns."""
    return (stage.learns or KINDS[stage.kind].learns) != "indexer"


def check_indexers(stage: StageSettings, indexed: bool) -> None:
    """ValueError where a stage needs indexers and the model has none (`indexed` is False)."""
    if indexed:
        return
    if not teaches_base(stage) or stage.kind in ("warmup", "sparse"):
        raise ValueError(f"a {stage.kind} stage has nothing to learn: the model has no indexers")
    if stage.kind == "distil" and stage.teacher is None:
        raise ValueError("a distil stage needs a teacher: a model without indexers is its own dense form")


def indexer_parameters(decoder: Decoder) -> set[nn.Parameter]:
    """The parameters of all indexers."""
    return {p for module in decoder.modules() if isinstance(module, Indexer) for p in module.parameters()}
