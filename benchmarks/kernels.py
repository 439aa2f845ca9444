"""Why the torch kernels are written as they are: each choice beside what it replaced, in turns in one process.

python benchmarks/kernels.py [--threads N] [--json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from report import circumstances, print_table
from torch.nn import functional

from foveal.kernels import linear, pack_weight
from foveal.kernels.keys import take_rows
from foveal.kernels.quantise import e4m3_to_float32

REPETITIONS = 15
COLD_BYTES = 128 << 20  # more than any level of cache, as the weights of a model are


@dataclass(frozen=True)
class Comparison:
    """Median microseconds of one call."""

    what: str
    before: str
    before_us: float
    after: str
    after_us: float

    @property
    def ratio(self) -> float:
        """How many times faster the choice is."""
        return self.before_us / self.after_us


def compare(what: str, before: tuple[str, Callable[[], Any]], after: tuple[str, Callable[[], Any]]) -> Comparison:
    """Time two functions in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPETITIONS + 2):
        for (_, run), spent in zip((before, after), times, strict=True):
            start = time.perf_counter()
            run()
            spent.append((time.perf_counter() - start) * 1e6)
    medians = [statistics.median(spent[2:]) for spent in times]
    return Comparison(what, before[0], medians[0], after[0], medians[1])


def packed_weights() -> Iterator[Comparison]:
    """Weights streamed from memory, as in a model; times are for one matrix."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((576, 576), (3072, 576), (576, 1536)):
            count = COLD_BYTES // (rows * columns * dtype.itemsize)
            plain = [torch.randn(rows, columns, dtype=dtype) for _ in range(count)]
            packed = [pack_weight(weight) for weight in plain]
            for tokens in (1, 8):
                x = torch.randn(tokens, columns, dtype=dtype)
                name = f"{tokens} x {columns} -> {rows}, {str(dtype).removeprefix('torch.')}"
                # As default arguments: the loop goes on before the functions run.
                row = compare(
                    name,
                    ("F.linear", lambda x=x, weights=plain: [functional.linear(x, weight) for weight in weights]),
                    ("packed", lambda x=x, weights=packed: [linear(x, weight) for weight in weights]),
                )
                yield Comparison(name, row.before, row.before_us / count, row.after, row.after_us / count)


def small_operations() -> Iterator[Comparison]:
    """Gathers and decoding."""
    rows, chosen = torch.randn(8192, 160), torch.randint(0, 8192, (12, 256))
    yield compare(
        "gather 12 x 256 rows of 160",
        ("rows[chosen]", lambda: rows[chosen]),
        ("index_select", lambda: take_rows(rows, chosen)),
    )
    codes = torch.randint(0, 127, (8192, 128), dtype=torch.uint8)
    yield compare(
        "decode 8192 x 128 e4m3",
        (".to(float32)", lambda: codes.view(torch.float8_e4m3fn).to(torch.float32)),
        ("bits", lambda: e4m3_to_float32(codes)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        rows = [*packed_weights(), *small_operations()]
    if arguments.json:
        measured = [{**asdict(row), "ratio": row.ratio} for row in rows]
        print(json.dumps({"circumstances": circumstances(), "rows": measured}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    header = ["what", "before", "us", "now", "us", "ratio"]
    cells = [[r.what, r.before, f"{r.before_us:.0f}", r.after, f"{r.after_us:.0f}", f"{r.ratio:.2f}"] for r in rows]
    print_table(header, cells)


if __name__ == "__main__":
    main()
