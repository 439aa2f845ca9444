"""The plots of an evaluation as one SVG file, light and dark, without any library."""

import math
from collections.abc import Callable, Sequence
from html import escape

from foveal.cli.eval_panels import Line, Panel
from foveal.cli.plan_svg import COLOURS, DARK, LIGHT

_WIDTH, _PLOT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND = 56, 16, 34, 40, 18
_TICKS = 5

_STYLE = """
:root { color-scheme: light dark } .page { fill: #ffffff } text { fill: #5a6270; font: 12px system-ui, sans-serif }
.title { fill: #1c2026; font-size: 14px; font-weight: 600 } .grid { stroke: #dfe3e8 }
.line { fill: none; stroke: var(--colour); stroke-width: 2.5 } .dot { fill: var(--colour) }
.dashed { stroke-dasharray: 6 4 }
LIGHT
@media (prefers-color-scheme: dark) { .page { fill: #14171c } text { fill: #a3abb8 } .title { fill: #e8eaee }
  .grid { stroke: #343a44 } DARK }
"""


def svg(panels: Sequence[Panel]) -> str:
    """All panels below one another."""
    parts, top = [], 0
    for panel in panels:
        parts.append(f'<g transform="translate(0 {top})">{_panel(panel)}</g>')
        top += _height(panel)
    style = _STYLE.replace("LIGHT", _colours(LIGHT)).replace("DARK", _colours(DARK))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" role="img">'
        f'<style>{style}</style><rect class="page" width="{_WIDTH}" height="{top}"/>{"".join(parts)}</svg>\n'
    )


def _colours(colours: Sequence[str]) -> str:
    return " ".join(f".c{place} {{ --colour: {colour} }}" for place, colour in enumerate(colours))


def _height(panel: Panel) -> int:
    return _TOP + _PLOT + _BOTTOM + _LEGEND * len(panel.lines)


def _panel(panel: Panel) -> str:
    xs = sorted({x for line in panel.lines for x in line.xs})
    ys = [y for line in panel.lines for y in line.ys]
    low, high, ticks = (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]) if panel.share else _range(min(ys), max(ys))
    turn: Callable[[float], float] = math.log if panel.logarithmic else float
    across = _scale(turn(xs[0]), turn(xs[-1]), _LEFT, _WIDTH - _RIGHT)
    down = _scale(low, high, _TOP + _PLOT, _TOP)
    parts = [f'<text class="title" x="{_LEFT}" y="20">{escape(panel.title)}</text>']
    for tick in ticks:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in panel.ticks():
        place, y = across(turn(x)), _TOP + _PLOT + 16
        parts.append(f'<text x="{place:.1f}" y="{y}" text-anchor="middle">{x:.0f}</text>')
    x, y = _WIDTH - _RIGHT, _TOP + _PLOT + 32
    parts.append(f'<text x="{x}" y="{y}" text-anchor="end">{escape(panel.across)}</text>')
    for place, line in enumerate(panel.lines):
        parts.append(_line(line, place, lambda x: across(turn(x)), down))
    return "".join(parts)


def _line(line: Line, place: int, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    """The line, a dot at each value, and its entry below the plot."""
    kind = f"c{place % COLOURS}"
    dashed = " dashed" if place >= COLOURS else ""
    points = [(across(x), down(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline class="line {kind}{dashed}" points="{path}"/>']
    for (x, y), value in zip(points, line.ys, strict=True):
        tip = f"<title>{escape(line.name)}: {value:.4g}</title>"
        parts.append(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>')
    y = _TOP + _PLOT + _BOTTOM + _LEGEND * place
    parts.append(f'<line class="line {kind}{dashed}" x1="{_LEFT}" x2="{_LEFT + 22}" y1="{y + 4}" y2="{y + 4}"/>')
    parts.append(f'<text x="{_LEFT + 30}" y="{y + 8}">{escape(line.name)}</text>')
    return "".join(parts)


def _range(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round numbers around all values, and a few ticks between them."""
    spread = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / _TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * _TICKS >= spread)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [number * step for number in range(first, max(last, first + 1) + 1)]
    return ticks[0], ticks[-1], ticks


def _scale(start: float, stop: float, first: float, last: float) -> Callable[[float], float]:
    """From [start, stop] to [first, last]; a single value stands in the middle."""
    if start == stop:
        return lambda value: (first + last) / 2
    return lambda value: first + (value - start) / (stop - start) * (last - first)
