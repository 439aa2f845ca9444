"""The plots of a plan as a picture, drawn by matplotlib (an optional extra)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.cli.plan_curves import (
    Bar,
    Curve,
    bar_parts,
    brief,
    bytes_tick,
    cache_curves,
    decode_curves,
    share_bars,
    short,
)
from foveal.cli.plan_rows import amount
from foveal.cli.plan_svg import LIGHT
from foveal.costs.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND_COLUMNS, _LEGEND_ROW = 2, 0.2  # inches a row
_NAME = 26
"""Characters of a name that have room."""


def write_png(plans: Sequence[Plan], file: Path) -> None:
    """Cost against context, cache against context, and share by part, side by side. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install 'foveal[plot]'") from None
    context, curves = plans[0].request.context, decode_curves(plans)
    figure = Figure(figsize=(15, 4.6 + _LEGEND_ROW * -(-len(curves) // _LEGEND_COLUMNS)), layout="constrained")
    cost, cache, shares = figure.subplots(1, 3)
    _draw_curves(cost, curves, context, amount, "Multiply-accumulates of a decoded token")
    _draw_curves(cache, cache_curves(plans), context, bytes_tick, "Cache of one sequence")
    _draw_bars(shares, share_bars(plans))
    figure.savefig(file, dpi=110, format="png")


def _draw_curves(
    axes: "Axes", curves: Sequence[Curve], context: int, label: Callable[[float], str], title: str
) -> None:
    """Both axes logarithmic, with a mark at `context`."""
    for place, curve in enumerate(curves):
        colour, dashes = LIGHT[place % len(LIGHT)], "--" if place >= len(LIGHT) else "-"
        name = brief(curve.name, _NAME)
        axes.plot(curve.contexts, curve.values, label=name, linewidth=2, color=colour, linestyle=dashes)
    axes.set(xscale="log", yscale="log", title=title, xlabel="tokens of context")
    axes.set_xticks(curves[0].contexts[::2], [short(n) for n in curves[0].contexts[::2]])
    axes.yaxis.set_major_formatter(lambda value, _: label(value))
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    if context >= curves[0].contexts[0]:
        axes.axvline(context, color="grey", linewidth=1, linestyle=":")
    _legend(axes, below=-0.14)


def _draw_bars(axes: "Axes", bars: Sequence[Bar]) -> None:
    left = [0.0] * len(bars)
    for place, name in enumerate(bar_parts(bars)):
        shares: list[Any] = [100 * bar.shares.get(name, 0.0) for bar in bars]
        axes.barh(range(len(bars)), shares, left=left, label=name, color=LIGHT[place])
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(bars)), [brief(bar.name, _NAME) for bar in bars])
    axes.invert_yaxis()
    axes.set(title="Share of a decoded token's arithmetic, %", xlim=(0, 100))
    _legend(axes, below=-0.08)


def _legend(axes: "Axes", below: float) -> None:
    """Under the plot, where it hides no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=_LEGEND_COLUMNS, frameon=False)
