"""What every benchmark prints around its figures: when and where they were measured, and the table."""

import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch


def circumstances() -> dict[str, Any]:
    """Date, processor, threads and versions."""
    import transformers

    import foveal

    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "foveal": foveal.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table with columns of even width; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (header, ruler, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print(f"| {' | '.join(cells)} |")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
