"""A plan in the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from foveal.cli.plan_rows import Section, sections
from foveal.costs.plan import Plan

if TYPE_CHECKING:
    from foveal.costs.spectrum import LayerSpectrum

_WIDTH = 240


def print_plans(plans: Sequence[Plan], spectra: Sequence["LayerSpectrum"] | None) -> None:
    """Print every section as a table, and what should be known about the figures."""
    console = print_sections(sections(plans, spectra))
    for plan in plans:
        for note in plan.notes:
            console.print(f"{plan.name}: {note}", markup=False)


def print_sections(tables: Sequence[Section]) -> Console:
    """Print tables below one another; where they were printed."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a file or a pipe has no width to fold cells into
        console.width = _WIDTH
    for section in tables:
        table = Table(title=section.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for place, head in enumerate(section.heads):
            table.add_column(head, justify="right" if place else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    return console
