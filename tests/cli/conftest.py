"""A tiny checkpoint with a byte-level tokenizer, and a way to run the command in this process."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
from bytewise import write_tiny_model

from foveal.cli.main import main


class Ran(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `foveal` with these arguments."""

    def call(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["foveal", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random llama of one layer, in a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(folder)
