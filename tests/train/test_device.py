"""Training on a GPU, one that is not there (`waiting`): every operand lies where it must, and an update makes the host
wait once, for the figures that it reports."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make_oracle
from tiny import CONFIG, stage
from updates import MODELS, STAGE_KINDS, WITHOUT_EXPERTS, batch, settings
from waiting import DEVICE, device_that_is_not_there, on_device

from foveal.config import ModelConfig
from foveal.models.decoder import Decoder, Options
from foveal.train.checkpoints import Checkpoints
from foveal.train.learner import Learner
from foveal.train.objective import Objective
from foveal.train.parallel import Parallel, join
from foveal.train.schema import ParallelSettings, Recipe, StageSettings
from foveal.train.trainer import Trainer

pytest.importorskip("triton")
Make = Callable[..., Recipe]


def update(config: ModelConfig, options: Options, stage: StageSettings) -> dict[str, float]:
    """One whole update; what it logs."""
    decoder, parallel = on_device(lambda: Decoder(config, options)), Parallel(DEVICE)
    learner, objective = Learner(decoder, stage, parallel), Objective(decoder, stage, parallel)
    values = learner.update(0, objective.accumulate(batch(), 1))
    objective.balance()
    assert all(p.device == DEVICE for p in decoder.parameters())
    assert all(x.device == DEVICE or x.dim() == 0 for x in learner.tensors().values())
    return values


@pytest.mark.parametrize(("model", "kind"), [*product(MODELS, STAGE_KINDS), ("experts", "distil")])
def test_an_update_waits_once(model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 with float32 copies, Muon."""
    options = Options(torch.bfloat16, index_dtype="bfloat16")
    with device_that_is_not_there(monkeypatch) as waits:
        values = update(MODELS[model](), options, settings(kind, optimizer="muon", z_weight=0.1))
        assert waits.fetched == 1 and waits.sent > 0
    assert {"gradient_norm", "learning_rate"} < values.keys()


@pytest.mark.parametrize(("model", "kind"), [*product(WITHOUT_EXPERTS, STAGE_KINDS)])
def test_in_float32(model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW, layers computed again, indexers taught by a share of the tokens."""
    with device_that_is_not_there(monkeypatch) as waits:
        update(MODELS[model](), Options(checkpoint_activations=True), settings(kind, index_share=0.5))
        assert waits.fetched == 1


def test_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's version of the indexers' loss over everything, which a card's host must not wait for either."""
    monkeypatch.setattr("foveal.kernels.gpu.training._MOST_INDEX_NUMBERS", 8)
    monkeypatch.setattr("foveal.kernels.divergence.index_divergence._preferred", _without_triton())
    with device_that_is_not_there(monkeypatch) as waits:
        update(MODELS["grouped heads"](), Options(), settings("warmup"))
        assert waits.fetched == 1


def _without_triton() -> tuple[Any, ...]:
    from foveal.kernels import index_divergence

    return tuple(version for version in index_divergence._preferred if version.name != "triton")


STAGES = stage("warmup", 1) + stage("sparse", 2, micro_tokens=64, optimizer="muon")
EVALUATIONS = {"passkey_lengths": [400], "sample": "tan kilo"}


@pytest.fixture
def made(recipe: Make, tmp_path: Path) -> Recipe:
    """A whole run, with everything that it may be asked to evaluate."""
    (tmp_path / "long.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 512}))
    model = 'config = "long.json"\ndtype = "bfloat16"'
    return recipe(STAGES, model=model, checkpoint_minutes=1e-9, **EVALUATIONS)


def test_a_whole_run(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations, samples, checkpoints or results with operands on both sides; a result that stays on the device."""
    monkeypatch.setattr("foveal.train.evaluation._SAMPLE_TOKENS", 3)
    with device_that_is_not_there(monkeypatch) as waits:
        waits.patient = True
        (model,) = Trainer(made, Parallel(DEVICE)).train()
    log = [json.loads(line) for line in (made.run.output / "log.jsonl").read_text().splitlines()]
    evaluated = [line for line in log if "passkey_400" in line]
    assert len(evaluated) == 2 and all({"held_out_loss", "selection_recall", "sample"} < x.keys() for x in evaluated)
    assert (model / "model.safetensors").is_file()


def test_a_teacher_and_an_adapter(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher, a fingerprint or a merged model on the other side."""
    base = tmp_path / "base"
    make_oracle("deepseek_v3", base, vocab_size=320)
    Trainer(recipe(stage("pretrain", 1))).tokenizer.save_pretrained(base)
    indexer = "[model.indexer]\nheads = 16\nhead_dim = 32\ntopk = 12"
    model = f'start = "{base}"\ndtype = "bfloat16"\n{indexer}'
    made = recipe(stage("warmup", 1) + stage("distil", 1, teacher=str(base)), model)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 30, 1 << 30))
    monkeypatch.setattr("foveal.models.load.usable_device", torch.device)
    written: list[str] = []
    with device_that_is_not_there(monkeypatch) as waits:
        waits.patient = True
        for merge in (True, False):
            written += [path.name for path in Trainer(made, Parallel(DEVICE)).train(merge=merge)]
    assert written == ["model", "model", "adapter"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("first", [DEVICE, torch.device("cpu")])
def test_checkpoints_of_the_other_device(made: Recipe, monkeypatch: pytest.MonkeyPatch, first: torch.device) -> None:
    """A checkpoint, in the middle of a stage, that only the device that wrote it can read."""
    made = replace(made, run=replace(made.run, evaluate_tokens=0, passkey_lengths=(), sample=None))
    made = replace(made, stages=made.stages[1:])
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, *args: Any) -> None:
        save(self, *args)
        raise Stopped

    def train(device: torch.device) -> None:
        if device == DEVICE:
            with device_that_is_not_there(monkeypatch) as waits:
                waits.patient = True
                Trainer(made, Parallel(device)).train()
        else:
            Trainer(made, Parallel(device)).train()

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(Stopped):
        train(first)
    monkeypatch.setattr(Checkpoints, "save", save)
    train(torch.device("cpu") if first == DEVICE else DEVICE)
    log = [json.loads(line) for line in (made.run.output / "log.jsonl").read_text().splitlines()]
    assert {"update": 1, "resumed_from": "step-00000001"} in log
    assert [line["update"] for line in log if "loss" in line] == [1, 2]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two; which ones became the process's own."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    own: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", own.append)
    return own


@pytest.mark.parametrize(("given", "device"), [(None, "cpu"), ("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_one_process(cards: list[torch.device], given: str | None, device: str) -> None:
    """A device that is not the one asked for; a run that takes a GPU unasked."""
    parallel = join(ParallelSettings(), given)
    assert type(parallel) is Parallel and parallel.device == torch.device(device)
    assert cards == ([] if device == "cpu" else [torch.device(device)])


@pytest.mark.parametrize(("given", "device"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_under_torchrun(
    cards: list[torch.device], monkeypatch: pytest.MonkeyPatch, given: str | None, device: str
) -> None:
    """All processes on one GPU; none on any unless told."""
    groups: list[tuple[str, torch.device]] = []
    launched(monkeypatch, processes=2, rank=1)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, timeout: groups.append((backend,)))
    monkeypatch.setattr("foveal.train.parallel.together.Together", lambda device, expert, context: device)
    assert join(ParallelSettings(), given) == torch.device(device)
    assert groups == [("gloo" if device == "cpu" else "nccl",)]


def launched(monkeypatch: pytest.MonkeyPatch, processes: int, rank: int) -> None:
    for name, value in (("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", processes), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ("cuda:1", 2, "device 'cuda:1' is one GPU, but torchrun gives every process its own: say cuda"),
        ("cuda", 3, "torchrun started 3 processes on this machine, which has only 2 CUDA devices"),
        (None, 3, "torchrun started 3 processes on this machine, which has only 2 CUDA devices"),
        ("cuda:2", 0, "device 'cuda:2' was asked for, but this machine's last CUDA device is cuda:1"),
        ("tpu", 0, "device 'tpu' is not one that torch knows"),
        ("mps", 0, "device 'mps' is not supported"),
    ],
)
def test_devices_that_cannot_be(
    cards: list[torch.device], monkeypatch: pytest.MonkeyPatch, given: str | None, processes: int, message: str
) -> None:
    """Processes that wait for one that cannot start, or a traceback of the driver's."""
    if processes:
        launched(monkeypatch, processes, rank=0)
    with pytest.raises(ValueError, match=message):
        join(ParallelSettings(), given)
    assert not cards
