"""Recurrences on a CPU: the compiled kernels beside plain torch, and beside what the machine allows.

Selective scan, SSD, the delta rule with a decay a head and a decay a key dimension, and the convolution before them, at
the sizes of one layer of a released model, in float32: one token of 1 and of 32 sequences (decode), and one sequence of
2048 (prefill). Decode steps go round enough layers for their states to come from memory, as in a model.

Two bounds, both measured here: all inputs, outputs and states at the bandwidth of a copy, and the kernel's products and
multiply-adds at the rate of registers. "of bound" is the larger one over the time.

--training measures something else: forward and backward pass of what has a compiled backward pass, beside the form in
torch, one sequence of 512 tokens, in processor time of one thread, which other work on the machine disturbs less.

python benchmarks/recurrent.py [--threads 1 2] [--only scan ...] [--quick] [--training] [--json] [--plot FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from mla_core import medians, peak_gflops
from report import circumstances, print_table
from torch import Tensor
from torch.nn.functional import normalize

from foveal.kernels import Operation, Queries, causal_conv, delta_rule, selective_scan, ssd

PREFILL, QUICK_PREFILL = 2048, 256
TRAINING = 512  # tokens: the form in torch keeps several numbers for each token and state
BATCHES = (1, 32)
COLD_BYTES = 192 << 20  # more than any level of cache
HEADER = (
    *("operation", "sizes of", "threads", "what", "torch ms", "compiled ms", "torch / compiled"),
    *("memory bound ms", "arithmetic bound ms", "of bound %"),
)


@dataclass(frozen=True)
class Case:
    """An operation at one layer's sizes."""

    operation: Operation[..., Any]
    model: str
    make: Callable[[int, int], Sequence[Tensor | None]]
    """(tokens, sequences) -> its arguments; the state is the last one."""
    updates: int
    """Numbers that one token changes: of the state, or for the convolution products."""
    products: int
    """Products and multiply-adds for each."""


@dataclass(frozen=True)
class Row:
    """Medians, for one layer."""

    operation: str
    model: str
    threads: int
    what: str
    torch_ms: float
    compiled_ms: float
    memory_ms: float
    arithmetic_ms: float

    @property
    def ratio(self) -> float:
        """How many times longer torch takes."""
        return self.torch_ms / self.compiled_ms

    @property
    def bound_ms(self) -> float:
        """What neither memory nor arithmetic allows to be beaten."""
        return max(self.memory_ms, self.arithmetic_ms)


@dataclass(frozen=True)
class TrainingRow:
    """The least processor time of forward and backward pass, for one layer."""

    operation: str
    model: str
    tokens: int
    torch_ms: float
    compiled_ms: float


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do, measured."""

    threads: int
    bandwidth: float
    """Bytes a second read and written by copying."""
    flops: float
    """Operations a second in multiply-adds on registers."""

    @staticmethod
    def of(threads: int) -> "Ceilings":
        """With so many threads, which torch is told of."""
        torch.set_num_threads(threads)
        return Ceilings(threads, copy_bandwidth(), peak_gflops(threads, torch.float32) * 1e9)


def scan_inputs(tokens: int, sequences: int) -> Sequence[Tensor | None]:
    """mamba-2.8b."""
    channels, states = 5120, 16
    u_TX, dt_TX = torch.randn(tokens, channels), 0.1 * torch.rand(tokens, channels)
    b_TY, c_TY = torch.randn(tokens, states), torch.randn(tokens, states)
    a_XY = -torch.arange(1.0, states + 1).repeat(channels, 1)
    return u_TX, dt_TX, a_XY, b_TY, c_TY, torch.randn(sequences, channels, states)


def ssd_inputs(tokens: int, sequences: int) -> Sequence[Tensor | None]:
    """mamba2-2.7b."""
    heads, channels, states = 80, 64, 128
    x_THP, dt_TH = torch.randn(tokens, heads, channels), 0.1 * torch.rand(tokens, heads)
    b_TGY, c_TGY = torch.randn(tokens, 1, states), torch.randn(tokens, 1, states)
    return x_THP, dt_TH, -16 * torch.rand(heads), b_TGY, c_TGY, torch.randn(sequences, heads, channels, states)


def delta_inputs(tokens: int, sequences: int, *, groups: int, decays: int) -> Sequence[Tensor | None]:
    """Qwen3-Next-80B-A3B (16 groups, 1 decay), Kimi-Linear-48B-A3B (32 groups, 128 decays)."""
    heads, dim = 32, 128
    q_TGP, k_TGP = (normalize(torch.randn(tokens, groups, dim), dim=-1) for _ in "qk")
    decay_THP, beta_TH = -torch.rand(tokens, heads, decays), torch.rand(tokens, heads)
    v_THV = torch.randn(tokens, heads, dim)
    return q_TGP, k_TGP, v_THV, decay_THP, beta_TH, torch.randn(sequences, heads, dim, dim)


def conv_inputs(tokens: int, sequences: int) -> Sequence[Tensor | None]:
    """Qwen3-Next-80B-A3B."""
    channels, taps = 8192, 4
    return torch.randn(tokens, channels), torch.randn(channels, taps), None, torch.randn(sequences, taps - 1, channels)


CASES = {
    # Two products and two multiply-adds, and six more for the exponential.
    "scan": Case(selective_scan, "mamba-2.8b", scan_inputs, 5120 * 16, 10),
    "SSD": Case(ssd, "mamba2-2.7b", ssd_inputs, 80 * 64 * 128, 3),
    "delta rule": Case(delta_rule, "qwen3-next", partial(delta_inputs, groups=16, decays=1), 32 * 128 * 128, 4),
    "KDA": Case(delta_rule, "kimi-linear", partial(delta_inputs, groups=32, decays=128), 32 * 128 * 128, 4),
    "convolution": Case(causal_conv, "qwen3-next", conv_inputs, 8192 * 4, 1),
}


def copy_bandwidth() -> float:
    """Bytes a second read and written by copying, the best of several."""
    source = torch.ones(COLD_BYTES // 4)
    target, times = torch.zeros_like(source), []
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def measure(name: str, lengths: Sequence[int], ceilings: Ceilings, repetitions: int) -> Row:
    """Both versions in turns in this process."""
    case, tokens = CASES[name], sum(lengths)
    queries = Queries((0, *accumulate(lengths)), (0,) * len(lengths))
    first = case.make(tokens, len(lengths))
    moved = _bytes([*first, *case.operation(*first, queries)])
    layers = [first]
    for _ in range(COLD_BYTES // moved):
        layers.append([None if x is None else x.clone() for x in first])

    def run(version: str) -> None:
        for inputs in layers:
            case.operation(*inputs, queries, version=version)

    plain = "loop" if "loop" in case.operation.versions else "torch"  # which of them is quicker without gradients
    versions = [plain, case.operation.chosen()]
    torch_ms, compiled_ms = (
        spent / len(layers) for spent in medians([partial(run, version) for version in versions], repetitions)
    )
    what = f"prefill {tokens}" if len(lengths) < tokens else f"decode, {len(lengths)}"
    memory_ms = moved / ceilings.bandwidth * 1e3
    arithmetic_ms = 2 * case.products * case.updates * tokens / ceilings.flops * 1e3
    return Row(name, case.model, ceilings.threads, what, torch_ms, compiled_ms, memory_ms, arithmetic_ms)


def measure_training(name: str, tokens: int, repetitions: int) -> TrainingRow:
    """Both versions in turns in this process, with gradients of all inputs."""
    torch.set_num_threads(1)
    case = CASES[name]
    inputs = [None if x is None else x.requires_grad_() for x in case.make(tokens, 1)]
    learnt = [x for x in inputs if x is not None]
    versions = ("torch", case.operation.chosen(gradients=True))
    spent: dict[str, list[float]] = {version: [] for version in versions}
    for _ in range(repetitions + 1):
        for version in versions:
            start = time.thread_time()
            out, last = case.operation(*inputs, Queries((0, tokens), (0,)), version=version)
            torch.autograd.grad(out.sum() + last.sum(), learnt)
            spent[version].append((time.thread_time() - start) * 1e3)
    torch_ms, compiled_ms = (min(spent[version][1:]) for version in versions)
    return TrainingRow(name, case.model, tokens, torch_ms, compiled_ms)


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def plot(rows: Sequence[Row], file: Path) -> None:
    """The times of both versions over the bound, a panel for each number of threads."""
    from matplotlib import pyplot

    counts = sorted({row.threads for row in rows})
    figure, panels = pyplot.subplots(
        1, len(counts), figsize=(5.5 * len(counts), 5), layout="constrained", sharey=True, squeeze=False
    )
    for threads, axes in zip(counts, panels[0], strict=True):
        shown = [row for row in reversed(rows) if row.threads == threads]
        places = range(len(shown))
        over = {
            "torch": [row.torch_ms / row.bound_ms for row in shown],
            "compiled": [row.compiled_ms / row.bound_ms for row in shown],
        }
        axes.hlines(places, over["compiled"], over["torch"], "0.8")
        for version, times in over.items():
            axes.plot(times, places, "o", label=version)
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="time / bound", title=f"{threads} thread{'s' if threads > 1 else ''}")
        axes.set_yticks(places, [f"{row.operation}, {row.what}" for row in shown])
    panels[0][0].legend()
    figure.suptitle("Recurrences of one layer on a CPU: how far from the bound")
    figure.savefig(file)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"prefill {QUICK_PREFILL} tokens, one repetition")
    parser.add_argument("--training", action="store_true", help="forward and backward pass instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times over the bounds (needs matplotlib)")
    arguments = parser.parse_args()
    if CASES["scan"].operation.chosen() == "torch":
        parser.error("there are no compiled kernels here (foveal doctor says more)")
    torch.manual_seed(0)
    prefill, repetitions = (QUICK_PREFILL, 1) if arguments.quick else (PREFILL, arguments.repetitions)
    if arguments.training:
        tokens = QUICK_PREFILL if arguments.quick else TRAINING
        learning = [name for name in arguments.only if CASES[name].operation.chosen(gradients=True) != "torch"]
        rows_of_training = [measure_training(name, tokens, repetitions) for name in learning]
        print_training(rows_of_training, as_json=arguments.json)
        return
    rows, reached = [], []
    for threads in arguments.threads:
        reached.append(ceilings := Ceilings.of(threads))
        for name in arguments.only:
            for lengths in (*([1] * batch for batch in BATCHES), [prefill]):
                rows.append(measure(name, lengths, ceilings, repetitions))
                told = f"{name}, {rows[-1].what}, {threads} thread(s): {rows[-1].ratio:.1f}x"
                print(told, file=sys.stderr, flush=True)
    if arguments.plot:
        plot(rows, arguments.plot)
    print_rows(rows, reached, as_json=arguments.json)


def print_training(rows: Sequence[TrainingRow], *, as_json: bool) -> None:
    """The table under the circumstances it was measured in."""
    told = {name: value for name, value in circumstances().items() if name != "threads"}
    if as_json:
        print(json.dumps({"circumstances": told, "training": [asdict(row) for row in rows]}))
        return
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    print_table(
        ("operation", "sizes of", "tokens", "torch CPU ms", "compiled CPU ms", "torch / compiled"),
        [
            [
                *(row.operation, row.model, str(row.tokens)),
                *(f"{row.torch_ms:.1f}", f"{row.compiled_ms:.1f}", f"{row.torch_ms / row.compiled_ms:.1f}"),
            ]
            for row in rows
        ],
    )


def print_rows(rows: Sequence[Row], reached: Sequence[Ceilings], *, as_json: bool) -> None:
    """The table under the circumstances it was measured in."""
    told = {name: value for name, value in circumstances().items() if name != "threads"}
    if as_json:
        measured = {
            "ceilings": [asdict(ceilings) for ceilings in reached],
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        }
        print(json.dumps({"circumstances": told, **measured}))
        return
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    for ceilings in reached:
        speeds = f"{ceilings.bandwidth / 1e9:.1f} GB/s by copying, {ceilings.flops / 1e9:.0f} GFLOP/s"
        print(f"{ceilings.threads} thread(s): {speeds}")
    print_table(
        HEADER,
        [
            [
                *(row.operation, row.model, str(row.threads), row.what),
                *(f"{row.torch_ms:.3f}", f"{row.compiled_ms:.3f}", f"{row.ratio:.1f}"),
                *(f"{row.memory_ms:.3f}", f"{row.arithmetic_ms:.3f}", f"{100 * row.bound_ms / row.compiled_ms:.0f}"),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
