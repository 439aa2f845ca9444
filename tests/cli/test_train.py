"""`foveal train`: recipes from the command line, and what a mistake looks like."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIG, stage

from foveal.train.recipe import read_recipe
from foveal.train.schema import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two updates of a tiny model."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text(
        "\n<|endoftext|>\n".join(f"Once there was {n} and {n * n}. " * 20 for n in range(30))
    )
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nconfig = "config.json"\n[data]\ncache = "cache"\nheld_out = 0.1\n[data.tokenizer]\nvocab_size = 300\n'
        f'[[data.text]]\nfiles = ["text.txt"]\n{stage("pretrain", 2)}\n[run]\noutput = "run"\nevaluate_tokens = 64\n'
    )
    return path


def test_trains_and_says_what_it_wrote(run: Any, recipe: Path) -> None:
    """A run whose result is not named, or cannot be used by the next command."""
    result = run("train", str(recipe), "--set", "stages.0.steps=3", "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)
    assert written["updates"] == 3 and written["tokens"] == 3 * 128
    assert written["written"] == [str(recipe.parent / "run" / "model")]
    assert run("generate", written["written"][0], "Once", "--max-tokens", "3").code == 0


def test_the_cpu_is_the_default(run: Any, recipe: Path) -> None:
    """A run that goes elsewhere unasked, or another way where the device is said."""
    results = []
    for output, device in (("default", ()), ("said", ("--device", "cpu"))):
        assert run("train", str(recipe), "--set", f"run.output={recipe.parent / output}", *device).code == 0
        folder = recipe.parent / output
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [(line.get("loss"), line.get("gradient_norm"), line.get("held_out_loss")) for line in lines]
        results.append((losses, (folder / "model" / "model.safetensors").read_bytes()))
    assert results[0] == results[1] and len(results[0][0]) == 3


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device 'cuda' was asked for, but this machine has no usable CUDA device"),
        ("cuda:1", "device 'cuda:1' was asked for, but this machine has no usable CUDA device"),
        ("gpu", "device 'gpu' is not one that torch knows"),
        ("meta", "device 'meta' is not supported (only cpu and cuda)"),
    ],
)
def test_devices_that_are_not_there(
    run: Any, recipe: Path, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, or a run that quietly goes elsewhere."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("train", str(recipe), "--device", device)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result
    assert not (recipe.parent / "run").exists()


def test_a_gpu_for_several_processes(run: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torchrun's processes on one GPU."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2" if name != "LOCAL_RANK" else "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    result = run("train", str(recipe), "--device", "cuda:1")
    assert (result.code, result.out) == (2, "")
    assert result.err == "foveal: device 'cuda:1' is one GPU, but torchrun gives every process its own: say cuda\n"


def test_explains_every_key(run: Any, tmp_path: Path) -> None:
    """A key without a meaning, or an explanation that is no recipe once its gaps are filled."""
    result = run("train", "--explain")
    assert result.code == 0
    for word in ("tokens_per_step", "checkpoint_activations", "indexer_learning_rate", "held_out", "evaluate_every"):
        assert word in result.out
    filled = result.out.replace("# config = ...", 'config = "c.json"').replace("output = ...", 'output = "o"')
    filled = filled.replace("files = ...", 'files = ["t"]').replace("kind = ...", 'kind = "pretrain"')
    for key in ("steps", "context", "tokens_per_step"):
        filled = filled.replace(f"\n{key} = ...", f"\n{key} = 64")
    path = tmp_path / "recipe.toml"
    path.write_text(filled)
    assert read_recipe(path, Recipe).stages[0].kind == "pretrain"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.0.kind=pretraining"], "stages.0.kind = 'pretraining'"),
        (["stages.0.steps=0"], "stages.0.steps = 0"),
        (["stages.0.contxt=4"], "contxt"),
        (["stages.0.tokens_per_step=100"], "tokens_per_step = 100"),
        (["stages.0.teacher=x"], "teacher = 'x'"),
        (["model.start=x"], "either start (a model) or config"),
        (["model.config=none.json"], "none.json"),
        (["model.dtype=float8"], "model.dtype = 'float8'"),
        (["stages.0.learning_rate=nan"], "learning_rate"),
        (["run.seed=-1"], "run.seed = -1"),
        (["stages.0.context=4096", "stages.0.tokens_per_step=4096"], "256 positions"),
    ],
)
def test_mistakes(run: Any, recipe: Path, overrides: list[str], message: str) -> None:
    """A traceback, or a run that starts on a wrong recipe."""
    given = [part for override in overrides for part in ("--set", override)]
    result = run("train", str(recipe), *given)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result
    assert not (recipe.parent / "run").exists()


def test_nothing_to_hold_out(run: Any, recipe: Path) -> None:
    """Finding out after hours of training that there is no text to evaluate on."""
    (recipe.parent / "text.txt").write_text("One document alone. " * 50)
    result = run("train", str(recipe))
    assert result.code == 2 and "evaluate_tokens = 64" in result.err and result.err.count("\n") == 1
    assert not (recipe.parent / "run").exists()


def test_no_recipe(run: Any, tmp_path: Path) -> None:
    """A missing file or argument that ends in a traceback."""
    assert run("train").code == 2
    assert run("train", str(tmp_path / "none.toml")).code == 2


def test_a_gradient_that_is_not_finite(run: Any, recipe: Path) -> None:
    """A traceback where training diverged."""
    result = run("train", str(recipe), "--set", "stages.0.learning_rate=1e20", "--set", "stages.0.clip=0")
    assert result.code == 2 and result.out == ""
    assert result.err.splitlines()[-1].startswith("foveal: the gradient at step 1 of this pretrain stage is nan")
