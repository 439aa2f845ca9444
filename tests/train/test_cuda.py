"""Training on a GPU against training on the CPU; needs one (`make cuda`)."""

import json
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from tiny import stage
from updates import MODELS, STAGE_KINDS, differ, update

from foveal.models.decoder import Options
from foveal.train.checkpoints import Checkpoints
from foveal.train.objective import Objective
from foveal.train.parallel import join
from foveal.train.schema import ParallelSettings, Recipe
from foveal.train.trainer import Trainer

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(("model", "kind"), [*product(MODELS, STAGE_KINDS), ("experts", "distil")])
def test_an_update(model: str, kind: str) -> None:
    """A kernel that reads, sums or differentiates something else than the CPU does, in float32."""
    (expected, exact), (values, gradients) = (update(model, kind, device) for device in ("cpu", "cuda"))
    assert values == pytest.approx(expected, rel=1e-3) and gradients.keys() == exact.keys()
    assert differ(gradients, exact) < 1e-2


@pytest.mark.parametrize(("model", "kind"), [*product(MODELS, STAGE_KINDS)])
def test_what_waits(model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation before the figures are read that makes the host wait: the driver's own word. Experts wait below
    SM90."""
    if model not in ("grouped heads", "latents") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's product of groups waits on this card")
    accumulate = Objective.accumulate

    def watched(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return accumulate(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = Options(torch.bfloat16, index_dtype="bfloat16")
    update(model, kind, "cuda", options)  # compiles the kernels
    monkeypatch.setattr(Objective, "accumulate", watched)
    update(model, kind, "cuda", options)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_goes_on_elsewhere(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, devices: tuple[str, str]
) -> None:
    """A checkpoint that only the device that wrote it can read, or a run that is another one there."""
    stages = stage("pretrain", 2, optimizer="muon") + stage("warmup", 1) + stage("sparse", 3, micro_tokens=64)
    model = 'config = "config.json"\ndtype = "bfloat16"'
    one, moved = (recipe(stages, model=model, output=output, checkpoint_minutes=1e-9) for output in ("one", "moved"))
    Trainer(one, join(ParallelSettings(), "cpu")).train()
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, number: int, *args: Any) -> None:
        save(self, number, *args)
        if number == 4:
            raise Stopped

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(Stopped):
        Trainer(moved, join(ParallelSettings(), devices[0])).train()
    monkeypatch.setattr(Checkpoints, "save", save)
    (written,) = Trainer(moved, join(ParallelSettings(), devices[1])).train()
    assert (written / "model.safetensors").is_file()
    expected, found = (
        [json.loads(line).get("loss", 0.0) for line in (run.run.output / "log.jsonl").read_text().splitlines()]
        for run in (one, moved)
    )
    assert [loss for loss in found if loss] == pytest.approx([loss for loss in expected if loss], rel=2e-2)
