"""Plots as SVG text, coloured by the page's style sheet so that they follow light and dark."""

import math
from collections.abc import Callable, Sequence
from html import escape

from foveal.cli.plan_curves import Bar, Curve, bar_parts, brief, short

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 10, 40
_BAR, _GAP, _NAME = 22, 10, 134
_BESIDE, _ABOVE = 15, 60
"""Characters of a name that fit beside a bar, or above it."""
LIGHT = ("#2a6fdb", "#d1602b", "#1f9d72", "#8b54c9", "#b58a12", "#cc3f7b", "#4a8a9e", "#7a6a5a")
DARK = ("#6ea8ff", "#ff9a66", "#4fd3a3", "#c39bff", "#e3bb4b", "#ff82b4", "#7cc5d9", "#bcaa98")
"""Colours of series on a light and on a dark page."""
COLOURS = len(LIGHT)
"""Series that have a colour of their own; the next ones are dashed."""


def line_plot(curves: Sequence[Curve], label: Callable[[float], str], title: str, context: int) -> str:
    """Curves over context, both axes logarithmic, with a mark at `context`. `label` writes a value of the vertical
    axis; `title` is what the plot shows, for those who cannot see it."""
    contexts = curves[0].contexts
    values = [value for curve in curves for value in curve.values if value > 0]
    low, high = _decades(values)
    across = _scale(math.log(contexts[0]), math.log(contexts[-1]), _LEFT, _WIDTH - _RIGHT)
    down = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [_open(_HEIGHT, title)]
    for tick in _ticks(low, high):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label(10.0**tick))}</text>')
    for length in contexts[::2]:
        x = across(math.log(length))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 21}" text-anchor="middle">{short(length)}</text>')
    if context >= contexts[0]:
        x = across(math.log(context))
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">tokens of context</text>')
    for place, curve in enumerate(curves):
        points = [
            f"{across(math.log(n)):.1f},{down(math.log10(value)):.1f}"
            for n, value in zip(curve.contexts, curve.values, strict=True)
            if value > 0
        ]
        parts.append(f'<polyline class="line {_classes(place)}" points="{" ".join(points)}"/>')
    parts.append("</svg>")
    return "".join(parts) + _legend([curve.name for curve in curves])


def bar_plot(bars: Sequence[Bar], title: str) -> str:
    """One bar of 100 % a row, its name to the left, or above where some name is long."""
    names, beside = bar_parts(bars), all(len(bar.name) <= _BESIDE for bar in bars)
    left, above = (_NAME, 0) if beside else (0, _BAR - 2)
    step = above + _BAR + _GAP
    parts = [_open(len(bars) * step + _GAP, title)]
    for row, bar in enumerate(bars):
        y, x = _GAP + row * step + above, float(left)
        if beside:
            parts.append(f'<text x="{left - 6}" y="{y + 16}" text-anchor="end">{escape(bar.name)}</text>')
        else:
            parts.append(f'<text x="0" y="{y - 6}">{escape(brief(bar.name, _ABOVE))}</text>')
        for name, part in bar.shares.items():
            width = part * (_WIDTH - left - _RIGHT)
            fill = _classes(names.index(name))
            tip = f"<title>{escape(bar.name)}: {escape(name)} {100 * part:.1f} %</title>"
            parts.append(
                f'<rect class="bar {fill}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}">{tip}</rect>'
            )
            if width > 40:
                parts.append(
                    f'<text class="inside" x="{x + width / 2:.1f}" y="{y + 16}" text-anchor="middle">'
                    f"{100 * part:.0f} %</text>"
                )
            x += width
    parts.append("</svg>")
    return "".join(parts) + _legend(names)


def _open(height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'


def _legend(names: Sequence[str]) -> str:
    entries = (
        f'<li><span class="key {_classes(place)}"></span>{escape(name)}</li>' for place, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _classes(place: int) -> str:
    return f"c{place % COLOURS}" + (" dashed" if place >= COLOURS else "")


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Exponents of ten between which all values lie, a decade apart at least."""
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2
    return (low, high) if high - low >= 1 else (low, low + 1)


def _ticks(low: float, high: float) -> list[int]:
    """Whole powers of ten, not more than seven."""
    powers = range(math.ceil(low), math.floor(high) + 1)
    return list(powers)[:: max(1, -(-len(powers) // 7))]


def _scale(start: float, stop: float, first: float, last: float) -> Callable[[float], float]:
    return lambda value: first + (value - start) / (stop - start) * (last - first)
