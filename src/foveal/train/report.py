"""What a run says while it goes on: a progress bar, a JSONL log, and TensorBoard's."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LOG = "log.jsonl"


class Quiet:
    """What processes report that do not lead: nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, values: Mapping[str, Any]) -> None:
        """See `Report.update`."""

    def event(self, values: Mapping[str, Any]) -> None:
        """See `Report.event`."""


class Report(Quiet):
    """The log of a run, and a bar on a terminal. Use it as a context manager."""

    def __init__(self, folder: Path, updates: int, done: int, *, tensorboard: bool) -> None:
        """`updates` of the whole run, of which `done` stand in the log; later lines are left from a run that was
        killed, and go."""
        folder.mkdir(parents=True, exist_ok=True)
        self._done = done
        self._file = folder / LOG
        _forget_after(self._file, done)
        self._log = self._file.open("a", encoding="utf-8")
        self._boards = _tensorboard(folder) if tensorboard else None
        self._bar = _Bar(updates, done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._log.close()
        if self._boards is not None:
            self._boards.close()

    def update(self, values: Mapping[str, Any]) -> None:
        """One update: numbers and words by name, "update" among them."""
        self._write(values)
        self._bar.advance(values)

    def event(self, values: Mapping[str, Any]) -> None:
        """Something besides updates: an evaluation, a sample, a checkpoint."""
        self._write(values)
        self._bar.say(" · ".join(f"{name} {_short(value)}" for name, value in values.items()))

    def _write(self, values: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._log.flush()
        if self._boards is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "update":
                    self._boards.add_scalar(name, value, values["update"])


class _Bar:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, updates: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._updates = updates
        self._terminal = sys.stderr.isatty()
        self._every = max(1, updates // 200)
        columns = (TextColumn("{task.fields[text]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not self._terminal)
        self._progress.start()
        self._task = self._progress.add_task("training", total=updates, completed=done, text="")

    def advance(self, values: Mapping[str, Any]) -> None:
        names = ("stage", "loss", "index_loss", "tokens_per_second", "mfu")
        text = " · ".join(f"{name} {_short(values[name])}" for name in names if name in values)
        self._progress.update(self._task, advance=1, text=text)
        if not self._terminal and values["update"] % self._every == 0:
            self.say(f"{values['update']}/{self._updates} · {text}")

    def say(self, line: str) -> None:
        if self._terminal:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._progress.stop()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _forget_after(file: Path, done: int) -> None:
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _update_of(line) <= done]
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _update_of(line: str) -> float:
    try:
        return float(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):  # cut short when the run was killed
        return float("inf")


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("run.tensorboard = true needs the package tensorboard: pip install 'foveal[train]'") from None
    return SummaryWriter(str(folder / "tensorboard"))
