"""The plots of an evaluation as a picture, drawn by matplotlib (an optional extra)."""

from collections.abc import Sequence
from pathlib import Path

from foveal.cli.eval_panels import Panel


def write_png(panels: Sequence[Panel], file: Path) -> None:
    """All panels side by side. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a .png plot needs matplotlib: pip install 'foveal[plot]' (an .svg needs nothing)") from None
    figure = Figure(figsize=(6.5 * len(panels), 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            axes.plot(line.xs, line.ys, label=line.name, linewidth=2, marker="o", markersize=4)
        axes.set(title=panel.title, xlabel=panel.across)
        if panel.logarithmic:
            axes.set_xscale("log", base=2)
        if panel.share:
            axes.set_ylim(0, 1)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110, format="png")
