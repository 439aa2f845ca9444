"""A plan in the terminal."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from foveal.cli.plan_rows import Section, sections
from foveal.costs.plan import Plan

if TYPE_CHECKING:
    from foveal.costs.spectrum import LayerSpectrum

_WIDTH = 240
_GAP = 2
"""Spaces between columns."""


def print_plans(plans: Sequence[Plan], spectra: Sequence["LayerSpectrum"] | None) -> None:
    """Print every section as a table, and what should be known about the figures."""
    console = print_sections(sections(plans, spectra))
    for plan in plans:
        for note in plan.notes:
            console.print(f"{plan.name}: {note}", markup=False)


def print_sections(tables: Sequence[Section]) -> Console:
    """Print tables below one another; where they were printed. A table that is wider than the terminal goes on below,
    with its labels again."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a file or a pipe has no width to fold cells into
        console.width = _WIDTH
    for section in tables:
        for place, part in enumerate(_that_fit(section, console.width)):
            console.print(_table(part, title=None if place else section.title))
            console.print()
    return console


def _table(section: Section, title: str | None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, head in enumerate(section.heads):
        table.add_column(head, justify="right" if place else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*row)
    return table


def _that_fit(section: Section, width: int) -> Iterator[Section]:
    """The section's columns in as many parts as it takes, one column in each at least, the labels in all of them."""
    widths = [max(map(cell_len, cells)) for cells in zip(section.heads, *section.rows, strict=True)]
    parts, used = [[0]], widths[0]
    for place, needed in enumerate(widths[1:], start=1):
        if len(parts[-1]) > 1 and used + _GAP + needed > width:
            parts.append([0])
            used = widths[0]
        parts[-1].append(place)
        used += _GAP + needed
    for part in parts:
        heads, *rows = (tuple(cells[place] for place in part) for cells in (section.heads, *section.rows))
        yield Section(section.title, heads, tuple(rows))
