"""The command as a whole: start-up, help, and how errors end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foveal
from foveal.cli import session

_HEAVY = ("torch", "transformers", "huggingface_hub", "gguf")


@pytest.mark.parametrize("statement", ["import foveal", "import foveal.cli.main", "dir(__import__('foveal'))"])
def test_start_up_imports_nothing_heavy(statement: str) -> None:
    """Guards `foveal --help` in under half a second: torch alone takes longer."""
    program = f"import sys\n{statement}\nprint([name for name in {_HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    """Guards against an entry of `__all__` that no module has."""
    assert set(foveal.__all__) <= set(dir(foveal))
    for name in foveal.__all__:
        assert getattr(foveal, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = foveal.no_such_name


def test_help_names_every_command(run: Any) -> None:
    """Guards against a command that is written and not registered."""
    ended = run("--help")
    assert ended.code == 0
    assert all(command in ended.out for command in ("generate", "chat", "doctor"))


def test_version(run: Any) -> None:
    """Guards against a version that is not the package's."""
    assert run("--version") == (0, f"foveal {foveal.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "no/such/model.gguf", "hello"], "no/such/model.gguf"),
        (["generate", "{model}", "--file", "missing.txt"], "missing.txt: No such file or directory"),
        (["generate", "{model}", "hello", "--top-p", "2"], "top_p"),
        (["generate", "{model}", "hello", "--dtype", "int3"], "int3"),
        (["generate", "{model}", "hello", "--index-dtype", "int3"], "int3"),
        (["generate", "{model}", "hello", "--kv-cache-dtype", "int3"], "int3"),
        (["generate", "{model}", "x" * 600], "600 tokens"),
        (["chat", "no/such/model.gguf"], "no/such/model.gguf"),
    ],
)
def test_mistakes_end_in_one_line(run: Any, tiny_model: str, arguments: list[str], says: str) -> None:
    """Guards against tracebacks, and against options that are quietly ignored."""
    ended = run(*(argument.format(model=tiny_model) for argument in arguments))
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("foveal: ")
    assert ended.err.count("\n") == 1
    assert says in ended.err


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "m", "hello", "--file", "f"], ["generate", "m", "hello", "--bogus"], ["nothing"]],
)
def test_usage_errors_exit_with_2(run: Any, arguments: list[str]) -> None:
    """Guards against a misspelt call that goes on with defaults."""
    assert run(*arguments).code == 2


def test_a_chat_template_that_refuses_ends_in_one_line(run: Any, tiny_model: str, tmp_path: Path) -> None:
    """Guards against a traceback from inside jinja for what a model's own file says."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ raise_exception('never') }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run("generate", str(folder), "hello", "--chat") == (2, "", "foveal: never\n")


def test_ctrl_c_is_quiet(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback when someone stops a long answer."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "load", interrupted)
    assert run("generate", "m", "hello") == (130, "", "")
