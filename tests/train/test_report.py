"""The log of a run."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from foveal.train.report import LOG, Report


def update(number: int) -> dict[str, Any]:
    return {"update": number, "stage": "pretrain", "loss": 1.0 / number, "tokens_per_second": 10.0, "mfu": 0.5}


def test_a_resumed_log(tmp_path: Path) -> None:
    """Updates that were computed after the last checkpoint standing twice, or a half-written line ending the run."""
    with Report(tmp_path, 6, 0, tensorboard=False) as report:
        for number in (1, 2, 3, 4):
            report.update(update(number))
    with (tmp_path / LOG).open("a") as file:
        file.write('{"update": 5, "lo')
    with Report(tmp_path, 6, 2, tensorboard=False) as report:
        report.update(update(3))
        report.event({"update": 3, "held_out_loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 3] and lines[-1]["held_out_loss"] == 2.0


def test_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log file full of a progress bar's control characters, or nothing at all for hours."""
    with Report(tmp_path, 400, 0, tensorboard=False) as report:
        for number in range(1, 11):
            report.update(update(number))
    shown = capsys.readouterr().err
    assert shown.count("\n") == 5 and "\x1b" not in shown and "10/400" in shown and "loss 0.1" in shown


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that does nothing where the package is missing."""
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="needs the package tensorboard"):
        Report(tmp_path, 6, 0, tensorboard=True)
