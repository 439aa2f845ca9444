"""A plan as one page of HTML with its plots inside: no scripts, nothing to load, light and dark, wide and narrow."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from foveal.cli.plan_curves import bytes_tick, cache_curves, decode_curves, share_bars
from foveal.cli.plan_rows import Section, amount, sections, whole
from foveal.cli.plan_svg import DARK, LIGHT, bar_plot, line_plot
from foveal.costs.plan import Plan

if TYPE_CHECKING:
    from foveal.costs.spectrum import LayerSpectrum

_NARROW = 2
"""Columns of a table that has room beside another; the others take the page's width, below."""

_TITLE = 4
"""Models that the title names."""

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2026; --soft: #5a6270; --rule: #dfe3e8;
  --panel: #f6f8fa; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --text: #e8eaee; --soft: #a3abb8; --rule: #343a44;
  --panel: #1c2027; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1.2rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem } h2 { font-size: 1.05rem; margin: 0 0 .6rem }
p { color: var(--soft); margin: 0 0 1.2rem }
.plots { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  align-items: start }
.tables { columns: 2 26rem; column-gap: 1rem; margin-bottom: 1rem } .tables:empty { display: none }
section { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem; margin: 0 0 1rem;
  break-inside: avoid }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .5rem; text-align: right; border-bottom: 1px solid var(--rule) }
td, thead th { white-space: nowrap }
th { font-weight: 600 }
th:first-child { text-align: left; font-weight: 400; padding-left: 0; min-width: 9rem; position: sticky; left: 0;
  background: var(--panel) }
@media (min-width: 50rem) { .wide th:first-child { white-space: nowrap } }
thead th { color: var(--soft) }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font: 14px system-ui, sans-serif }
svg .inside { fill: var(--page); font-weight: 600 }
svg .grid { stroke: var(--rule) } svg .line { fill: none; stroke: var(--colour); stroke-width: 2.5 }
svg .bar { fill: var(--colour) } svg .dashed { stroke-dasharray: 6 4 }
svg .mark { stroke: var(--soft); stroke-dasharray: 2 3 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; margin: .6rem 0 0;
  font-size: .88rem }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem;
  background: var(--colour) }
.key.dashed { background: repeating-linear-gradient(90deg, var(--colour) 0 .25rem, transparent .25rem .4rem) }
"""


def page(plans: Sequence[Plan], spectra: Sequence["LayerSpectrum"] | None) -> str:
    """The whole page."""
    context = plans[0].request.context
    title = escape(f"{_names(plans)}: what {whole(context)} tokens of context cost")
    cost, cache = decode_curves(plans), cache_curves(plans)
    plots = [
        _panel("Multiply-accumulates of a decoded token", line_plot(cost, amount, "cost by context", context)),
        _panel("Cache of one sequence", line_plot(cache, bytes_tick, "cache by context", context)),
        _panel("Share of a decoded token's arithmetic", bar_plot(share_bars(plans), "share by part")),
    ]
    tables = sections(plans, spectra)
    narrow = [_panel(section.title, _table(section)) for section in tables if len(section.heads) <= _NARROW]
    wide = [_panel(section.title, _table(section)) for section in tables if len(section.heads) > _NARROW]
    notes = "".join(f"<li>{escape(plan.name)}: {escape(note)}</li>" for plan in plans for note in plan.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_style()}</style></head><body><h1>{title}</h1>"
        "<p>Counted from config.json by <code>foveal plan</code>. Times are the least that the device's peaks allow "
        "(roofline). Both axes of the curves are logarithmic; the dotted line is the context of the tables.</p>"
        f'<div class="plots">{"".join(plots)}</div><div class="tables">{"".join(narrow)}</div>{"".join(wide)}'
        f"{f'<ul>{notes}</ul>' if notes else ''}</body></html>\n"
    )


def _names(plans: Sequence[Plan]) -> str:
    names = [plan.name for plan in plans]
    if len(names) <= _TITLE:
        return ", ".join(names)
    return f"{', '.join(names[: _TITLE - 1])} and {len(names) - _TITLE + 1} others"


def _style() -> str:
    style = _STYLE
    for name, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        style = style.replace(name, " ".join(f"--c{place}: {colour};" for place, colour in enumerate(colours)))
    return style + "".join(f".c{place} {{ --colour: var(--c{place}) }}\n" for place in range(len(LIGHT)))


def _panel(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(section: Section) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in section.heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in section.rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
