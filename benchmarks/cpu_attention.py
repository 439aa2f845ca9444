"""Decoding with DeepSeek-V3.2's attention core on a CPU: do the times follow the arithmetic?

One query, 128 heads, latents of 512 + 64 in bfloat16, 64 index heads of 128, top-k 2048. For each context: the time of
dense attention (absorbed), of index scores and selection, and of attention over the selection, their shares of the
measured peak, and (scores + selection + sparse) / dense beside the same ratio in multiply-accumulates.

python benchmarks/cpu_attention.py [--threads 1 2] [--contexts 2048 ...] [--index fp8 int8 bf16] [--json] [--plot FILE]
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from mla_core import (
    INDEX_DIM,
    RANK,
    ROPE,
    TOPK,
    Core,
    dense_absorbed,
    filled,
    index_layout,
    latent_layout,
    medians,
    nearly_only_select,
    peak_gflops,
    score_and_select,
    sparse,
)
from report import circumstances, print_table

HEADS, INDEX_HEADS = 128, 64
HEADER = (
    *("threads", "index keys", "context", "dense ms", "scores + select ms", "select alone ms", "sparse ms"),
    *("dense % of peak", "scores % of peak", "sparse % of peak", "sparse / dense", "analytic"),
)
CONTEXTS = [2048, 4096, 8192, 16384, 32768, 65536, 131072]


@dataclass(frozen=True)
class Row:
    """One context; milliseconds are medians, shares are of the measured peak."""

    threads: int
    index: str
    context: int
    dense_ms: float
    select_ms: float
    top_ms: float
    sparse_ms: float
    dense_share: float
    score_share: float | None
    """Of the scores alone, the selection's time taken off; None where no key is scored (context <= top-k)."""
    sparse_share: float
    analytic: float

    @property
    def ratio(self) -> float:
        """Sparse over dense, measured."""
        return (self.select_ms + self.sparse_ms) / self.dense_ms


def measure(threads: int, context: int, indexes: list[str], repetitions: int) -> Iterator[Row]:
    """All parts in turns in this process."""
    torch.set_num_threads(threads)
    core = Core(HEADS, INDEX_HEADS, context, 1)
    contexts = core.contexts()
    latents = filled(latent_layout(context), contexts, RANK + ROPE)
    keys = {index: filled(index_layout(context, index), contexts, INDEX_DIM) for index in indexes}
    parts = [dense_absorbed(core, latents, None), sparse(core, latents, None), nearly_only_select(core, contexts)]
    parts += [score_and_select(core, keys[index], index, None) for index in indexes]
    dense_ms, sparse_ms, top_ms, *select_ms = medians(parts, repetitions)
    peak = peak_gflops(threads)

    def share(macs: int, milliseconds: float) -> float:
        return 2 * macs / (milliseconds * 1e6) / peak

    for index, spent in zip(indexes, select_ms, strict=True):
        yield Row(
            threads=threads,
            index=index,
            context=context,
            dense_ms=dense_ms,
            select_ms=spent,
            top_ms=top_ms,
            sparse_ms=sparse_ms,
            dense_share=share(core.absorbed_macs(), dense_ms),
            score_share=share(core.index_macs(), spent - top_ms) if context > TOPK else None,
            sparse_share=share(core.sparse_macs(), sparse_ms),
            analytic=(core.index_macs() + core.sparse_macs()) / core.absorbed_macs(),
        )


def crossover(rows: list[Row]) -> float | None:
    """The context at which the measured ratio passes 1, between the two measured contexts around it (in logarithms)."""
    for before, after in pairwise(rows):
        if before.ratio >= 1 > after.ratio:
            part = (before.ratio - 1) / (before.ratio - after.ratio)
            return float(before.context * (after.context / before.context) ** part)
    return None


def plot(rows: list[Row], file: Path) -> None:
    """Measured ratios and the analytic one against the context."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    analytic = sorted({(row.context, row.analytic) for row in rows})
    axes.plot(*zip(*analytic, strict=True), "k--", label="multiply-accumulates")
    for threads, index in sorted({(row.threads, row.index) for row in rows}):
        line = [(row.context, row.ratio) for row in rows if (row.threads, row.index) == (threads, index)]
        axes.plot(*zip(*line, strict=True), "o-", label=f"{index} index keys, {threads} thread(s)")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="time of sparse / time of dense")
    axes.set_xticks(sorted({row.context for row in rows}), [f"{c // 1024}K" for c in sorted({r.context for r in rows})])
    axes.set_title("One decode step of a V3.2 attention core on a CPU")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--index", nargs="+", choices=["fp8", "int8", "bf16"], default=["fp8", "int8", "bf16"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for threads in arguments.threads:
        for context in sorted(arguments.contexts):
            rows += measure(threads, context, arguments.index, arguments.repetitions)
    if arguments.plot:
        plot(rows, arguments.plot)
    print_rows(rows, as_json=arguments.json)


def print_rows(rows: list[Row], *, as_json: bool) -> None:
    """The table under the circumstances it was measured in."""
    peaks = {threads: peak_gflops(threads) for threads in sorted({row.threads for row in rows})}
    if as_json:
        measured = [{**asdict(row), "ratio": row.ratio} for row in rows]
        print(json.dumps({"circumstances": circumstances(), "peak_gflops": peaks, "rows": measured}))
        return
    told = {name: value for name, value in circumstances().items() if name != "threads"}
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    print("peak: " + ", ".join(f"{peak:.0f} GFLOP/s on {threads} thread(s)" for threads, peak in peaks.items()))
    print_table(
        HEADER,
        [
            [str(row.threads), row.index, str(row.context)]
            + [f"{value:.2f}" for value in (row.dense_ms, row.select_ms, row.top_ms, row.sparse_ms)]
            + [_percent(value) for value in (row.dense_share, row.score_share, row.sparse_share)]
            + [f"{row.ratio:.3f}", f"{row.analytic:.3f}"]
            for row in rows
        ],
    )
    for threads, index in sorted({(row.threads, row.index) for row in rows}):
        passed = crossover([row for row in rows if (row.threads, row.index) == (threads, index)])
        told = "outside these contexts" if passed is None else f"near {passed:.0f} tokens"
        print(f"{index} index keys, {threads} thread(s): sparse becomes faster than dense {told}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


if __name__ == "__main__":
    main()
