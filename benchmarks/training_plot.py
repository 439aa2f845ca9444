"""A training run as a picture, from the log.jsonl that `foveal train` keeps in its output folder.

    python benchmarks/training_plot.py LOG --plot FILE [--smooth 20]

Losses of every stage over the tokens read, with those on held-out text; below, how many passkeys were found, where the
run looked for any.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PASSKEY = "passkey_"

Line = dict[str, Any]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means of up to `width` values that end at each."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def runs_of(lines: Sequence[Line], loss: str) -> list[list[Line]]:
    """The updates that have this loss, parted where another stage came between or the stage changed."""
    parts: list[list[Line]] = []
    last: Line | None = None
    for line in (line for line in lines if "stage" in line):
        if loss in line:
            same = last is not None and loss in last and last["stage"] == line["stage"]
            parts[-1].append(line) if same else parts.append([line])
        last = line
    return parts


def plot(lines: Sequence[Line], file: Path, smooth: int) -> None:
    """Draw it."""
    from matplotlib import pyplot

    keys = sorted({key for line in lines for key in line if key.startswith(_PASSKEY)}, key=lambda key: int(key[8:]))
    ratios = [3, 1] if keys else [1]
    figure, panels = pyplot.subplots(
        len(ratios),
        1,
        figsize=(9, 3 + 1.6 * len(ratios)),
        layout="constrained",
        sharex=True,
        squeeze=False,
        height_ratios=ratios,
    )
    losses = panels[0][0]
    for place, (loss, label) in enumerate({"loss": "next token", "index_loss": "indexers, all layers"}.items()):
        for part in runs_of(lines, loss):
            at = [line["tokens"] / 1e6 for line in part]
            losses.plot(at, smoothed([line[loss] for line in part], smooth), color=f"C{place}", label=label)
            label = ""
    events, at, tokens = [], [], 0.0
    for line in lines:
        tokens = line["tokens"] / 1e6 if "tokens" in line else tokens
        if "held_out_loss" in line:
            events.append(line)
            at.append(tokens)
    losses.plot(at, [line["held_out_loss"] for line in events], "k.", label="next token, held-out text")
    losses.set(yscale="log", ylabel="loss, nats")
    losses.legend()
    for key in keys:
        panels[1][0].plot(at, [line.get(key) for line in events], ".-", label=f"{key[8:]} tokens")
    if keys:
        panels[1][0].set(ylabel="passkeys found", ylim=(-0.05, 1.05))
        panels[1][0].legend()
    panels[-1][0].set_xlabel("tokens read, millions")
    figure.savefig(file)


def main() -> None:
    """Parse, read, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE", help="where to draw (needs matplotlib)")
    parser.add_argument("--smooth", type=int, default=20, help="lines of the log that a point is the mean of")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.log.read_text(encoding="utf-8").splitlines()]
    plot(lines, arguments.plot, arguments.smooth)


if __name__ == "__main__":
    main()
