"""Every Triton kernel on this machine's GPU: checked against its torch version, then timed against two ceilings.

First the card's own ceilings are measured: the bandwidth of a copy, and matrix products in bfloat16 and e4m3. Every
kernel is checked at a small size. Then it is timed at the full size; its bound is the longer of what its bytes and its
operations take at the ceilings, and its share is the bound over its time. Beside it: torch's own way.

python benchmarks/gpu.py [--batch 64] [--context 131072] [--only WORDS] [--json]

Without a CUDA device nothing is measured: one line says so, and the exit code is 2.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gpu_cases import Case, Sizes, cases
from report import circumstances, print_table
from torch import Tensor

HEADER = ("kernel", "error", "ms", "TFLOP/s", "GB/s", "bound ms", "share", "compared with", "its ms", "times faster")
# Largest relative error of results in bfloat16 beside torch's, which rounds elsewhere.
TOLERANCE = 2e-2
# Of selections: which part may differ, where torch sums scores in another order and they are nearly equal.
EDGE = 1e-2
SMALL = Sizes(batch=3, context=3000, chunk=70, train=300, heads=20, index_heads=8, topk=256)


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best, measured."""

    bytes_per_second: float
    bf16_flops: float
    fp8_flops: float | None
    """None: the card does not multiply e4m3."""

    def bound_ms(self, case: Case) -> float:
        """The least time a case takes."""
        flops = (self.fp8_flops if case.rate == "fp8" else None) or self.bf16_flops
        return 1e3 * max(case.flops / flops, case.bytes_ / self.bytes_per_second)


@dataclass(frozen=True)
class Row:
    """What was measured of one kernel."""

    name: str
    ms: float
    tflops: float
    gigabytes: float
    bound_ms: float
    compared_with: str
    other_ms: float | None
    """None: torch's way ran out of memory."""


def median_ms(run: Callable[[], Any]) -> float:
    """Milliseconds on the card, the median; its level-two cache is emptied between runs."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=300, return_mode="median"))


def measure_ceilings() -> Ceilings:
    """Copying 1 GiB; products of 8192 x 8192 matrices."""
    source, target = (torch.empty(1 << 28, dtype=torch.float32, device="cuda") for _ in range(2))
    copied = 2 * source.nbytes / (1e-3 * median_ms(lambda: target.copy_(source)))
    size = 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    work = 2.0 * size**3
    bf16 = work / (1e-3 * median_ms(lambda: left @ right))
    fp8 = None
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        left_8, right_8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        fp8 = work / (1e-3 * median_ms(lambda: torch._scaled_mm(left_8, right_8, one, one, out_dtype=torch.bfloat16)))
    return Ceilings(copied, bf16, fp8)


def error_of(case: Case) -> float:
    """How far the Triton version's result is from torch's: relative; of whole numbers the share that differs."""
    found, expected = (_numbers(case.run(version)) for version in ("triton", case.plain))
    if case.selects:
        # Which positions only one of them selected; a list that differs in one entry is shifted from there on.
        found, expected = (_chosen(rows, case.selects) for rows in (found, expected))
        return float((found != expected).sum() / (2 * expected.sum()))
    if case.exact:
        return float((found != expected).double().mean())
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _numbers(result: Any) -> Tensor:
    """Everything that an operation returned, as one row; a copy, since writers return what they write to."""
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.detach().flatten() for part in parts]).clone()


def _chosen(positions: Tensor, topk: int) -> Tensor:
    """bool [T, N]: which positions each query selected."""
    positions_TK = positions.view(-1, topk).long()
    chosen = positions_TK.new_zeros(len(positions_TK), int(positions_TK.max()) + 2, dtype=torch.bool)
    return chosen.scatter_(1, positions_TK + 1, True)[:, 1:]


def check(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """The error of every kernel. Raises SystemExit that names the ones that are wrong."""
    errors = {case.name: error_of(case) for case in cases(sizes, device)}
    wrong = {name: error for name, error in errors.items() if not error <= _allowed(name)}
    if wrong:
        raise SystemExit("wrong results: " + ", ".join(f"{name} ({error:.2e})" for name, error in wrong.items()))
    return errors


def _allowed(name: str) -> float:
    if "select" in name:
        return EDGE
    return 0.0 if "write" in name or "round" in name else TOLERANCE


def measure(sizes: Sizes, ceilings: Ceilings, only: str) -> Iterator[Row]:
    """Every kernel whose name contains `only`."""
    for case in cases(sizes, torch.device("cuda")):
        if only not in case.name:
            continue
        ms = median_ms(lambda case=case: case.run("triton"))
        name, other = case.baseline or ("torch", lambda case=case: case.run(case.plain))
        try:
            other_ms: float | None = median_ms(other)
        except torch.cuda.OutOfMemoryError:
            other_ms = None
        torch.cuda.empty_cache()
        yield Row(case.name, ms, case.flops / ms / 1e9, case.bytes_ / ms / 1e6, ceilings.bound_ms(case), name, other_ms)


def core_ratio(rows: list[Row], sizes: Sizes) -> str | None:
    """(Scores + selection + sparse) over dense attention for a decode step, measured and by multiply-accumulates."""
    found = {row.name: row.ms for row in rows}
    parts = [
        *("score and select, decode, fp8 keys", "sparse MLA, decode, fp8 records", "dense MLA, decode, fp8 records")
    ]
    if not all(part in found for part in parts):
        return None
    per_key = sizes.heads * (2 * sizes.rank + sizes.rope)
    analytic = (sizes.index_heads * sizes.index_dim + min(1.0, sizes.topk / sizes.context) * per_key) / per_key
    measured = (found[parts[0]] + found[parts[1]]) / found[parts[2]]
    return f"a decode step's sparse core over its dense one: {measured:.3f}, by multiply-accumulates {analytic:.3f}"


def main() -> None:
    """Parse, check, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=Sizes.batch, help="sequences of a decode step")
    parser.add_argument("--context", type=int, default=Sizes.context)
    parser.add_argument("--only", default="", metavar="WORDS", help="kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU kernels are neither checked nor timed", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    sizes = Sizes(batch=arguments.batch, context=arguments.context)
    errors = check(SMALL, torch.device("cuda"))
    ceilings = measure_ceilings()
    rows = list(measure(sizes, ceilings, arguments.only))
    facts = {**circumstances(), "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    if arguments.json:
        measured = [{**asdict(row), "error": errors[row.name]} for row in rows]
        print(
            json.dumps({"circumstances": facts, "ceilings": asdict(ceilings), "sizes": _plain(sizes), "rows": measured})
        )
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    fp8 = "no e4m3" if ceilings.fp8_flops is None else f"{ceilings.fp8_flops / 1e12:.0f} TFLOP/s e4m3"
    print(f"ceilings: {ceilings.bytes_per_second / 1e9:.0f} GB/s, {ceilings.bf16_flops / 1e12:.0f} TFLOP/s bf16, {fp8}")
    print_table(HEADER, [_cells(row, errors[row.name]) for row in rows])
    ratio = core_ratio(rows, sizes)
    if ratio:
        print(ratio)


def _plain(sizes: Sizes) -> dict[str, Any]:
    return {name: value if isinstance(value, int) else str(value) for name, value in asdict(sizes).items()}


def _cells(row: Row, error: float) -> list[str]:
    other = ("out of memory", "-") if row.other_ms is None else (f"{row.other_ms:.3f}", f"{row.other_ms / row.ms:.1f}")
    speeds = (
        f"{row.tflops:.1f}",
        f"{row.gigabytes:.0f}",
        f"{row.bound_ms:.3f}",
        f"{100 * row.bound_ms / row.ms:.0f} %",
    )
    return [row.name, f"{error:.0e}", f"{row.ms:.3f}", *speeds, row.compared_with, *other]


if __name__ == "__main__":
    main()
