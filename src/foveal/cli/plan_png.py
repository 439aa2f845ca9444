"""The plots of a plan as a picture, drawn by matplotlib (an optional extra)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.cli.plan_curves import Bar, Curve, bar_parts, cache_curves, decode_curves, share_bars, short
from foveal.costs.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_png(plans: Sequence[Plan], file: Path) -> None:
    """Cost against context, cache against context, and share by part, side by side. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install 'foveal[plot]'") from None
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    cost, cache, shares = figure.subplots(1, 3)
    _draw_curves(cost, decode_curves(plans), "Multiply-accumulates of a decoded token")
    _draw_curves(cache, cache_curves(plans), "Cache of one sequence, bytes")
    _draw_bars(shares, share_bars(plans))
    figure.savefig(file, dpi=110, format="png")


def _draw_curves(axes: "Axes", curves: Sequence[Curve], title: str) -> None:
    for curve in curves:
        axes.plot(curve.contexts, curve.values, label=curve.name, linewidth=2)
    axes.set(xscale="log", yscale="log", title=title, xlabel="tokens of context")
    axes.set_xticks(curves[0].contexts[::2], [short(n) for n in curves[0].contexts[::2]])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _draw_bars(axes: "Axes", bars: Sequence[Bar]) -> None:
    left = [0.0] * len(bars)
    for name in bar_parts(bars):
        shares: list[Any] = [100 * bar.shares.get(name, 0.0) for bar in bars]
        axes.barh([bar.name for bar in bars], shares, left=left, label=name)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(title="Share of a decoded token's arithmetic, %", xlim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
