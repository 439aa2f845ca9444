"""The plots of an evaluation as a picture, drawn by matplotlib (an optional extra)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foveal.cli.eval_panels import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3


def write_png(panels: Sequence[Panel], file: Path) -> None:
    """All panels, three in a row. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a .png plot needs matplotlib: pip install 'foveal[plot]' (an .svg needs nothing)") from None
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.6 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel)
    figure.savefig(file, dpi=110, format="png")


def _draw(axes: "Axes", panel: Panel) -> None:
    for line in panel.lines:
        axes.plot(line.xs, line.ys, label=line.name, linewidth=2, marker="o", markersize=4)
    axes.set(title=panel.title, xlabel=panel.across, xscale="log" if panel.logarithmic else "linear")
    ticks = panel.ticks()
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
