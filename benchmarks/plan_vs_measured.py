"""What `foveal plan --device measured` predicts beside what the engine takes: prefill and decode times on this machine.

The prediction is the roofline of a bandwidth and a matrix rate that are measured here and now. It is a lower bound: it
knows nothing of overheads, of attention's softmax, or of products too small to reach the peak rate.

On a machine that others use, `--thread-time` with OMP_NUM_THREADS=1 takes the processor time of one thread on both
sides.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from report import circumstances, print_table
from vs_transformers import Case, FovealSide, random_dsa

from foveal import LLM
from foveal.costs import Device
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.costs.devices import measure_device
from foveal.costs.roofline import Setup, StepTime, decode_time, prefill_time
from foveal.models.load import open_checkpoint
from foveal.models.resolve import resolve_model

_DTYPE = "float32"  # the rate that is measured is that of float32


@dataclass(frozen=True)
class Effort:
    """How often everything is repeated."""

    prefills: int
    steps: int
    clock: Callable[[], float]
    """Seconds."""


@dataclass(frozen=True)
class Row:
    """One line of the table; the measured time is a median."""

    what: str
    predicted_ms: float
    measured_ms: float
    waits_for: str

    @property
    def error(self) -> float:
        """The prediction against what was measured: -0.5 is half of it."""
        return self.predicted_ms / self.measured_ms - 1


def compare(name: str, path: Path, cases: list[Case], device: Device, effort: Effort) -> Iterator[Row]:
    """Predict and measure each case of one model."""
    config = open_checkpoint(path).config
    dtypes = cache_dtypes(_DTYPE)
    setup = Setup(config, _DTYPE, dtypes, cache_cost(config, dtypes), device, devices=1)
    llm = LLM(str(path), dtype=_DTYPE, enable_prefix_caching=False, skip_tokenizer_init=True)
    for case in cases:
        prefill, decode = _measure(FovealSide(llm), case.prompts(config.vocab_size), effort)
        if case.batch == 1:
            yield _row(f"{name} prefill {case.length}", prefill_time(setup, case.length), prefill)
        context = case.length + effort.steps // 2  # the median step's
        yield _row(
            f"{name} decode, batch {case.batch}, context {case.length}", decode_time(setup, case.batch, context), decode
        )


def _measure(side: FovealSide, prompts: list[list[int]], effort: Effort) -> tuple[float, float]:
    """Milliseconds of a prefill and of a decode step, the first of each not counted."""
    side.start(prompts)
    prefills = [_milliseconds(lambda: side.start(prompts), effort.clock) for _ in range(effort.prefills)]
    side.step()
    steps = [_milliseconds(side.step, effort.clock) for _ in range(effort.steps)]
    side.stop()
    return statistics.median(prefills), statistics.median(steps)


def _milliseconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return (clock() - start) * 1e3


def _row(what: str, predicted: StepTime, measured_ms: float) -> Row:
    longest = max(predicted.parts.values(), key=lambda part: part.seconds)
    return Row(what, predicted.seconds * 1e3, measured_ms, longest.bound)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--thread-time", action="store_true", help="processor time of one thread (OMP_NUM_THREADS=1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.thread_time and os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("--thread-time needs OMP_NUM_THREADS=1: the time of other threads is not seen")
    clock = time.thread_time if arguments.thread_time else time.perf_counter
    effort = Effort(prefills=1, steps=5, clock=clock) if arguments.quick else Effort(prefills=3, steps=20, clock=clock)
    device = measure_device(clock)
    with tempfile.TemporaryDirectory() as folder:
        models = [
            ("SmolLM2-135M", resolve_model("smollm2"), [Case(1, 512), Case(8, 512)]),
            ("DSA-29M", random_dsa(Path(folder)), [Case(1, 1024), Case(1, 4096)]),
        ]
        rows = [row for name, path, cases in models for row in compare(name, path, cases, device, effort)]
    print_rows(rows, device, as_json=arguments.json)


def print_rows(rows: list[Row], device: Device, *, as_json: bool) -> None:
    """The table, under the circumstances it was measured in."""
    if as_json:
        lines = [{**asdict(row), "error": row.error} for row in rows]
        print(json.dumps({"circumstances": circumstances(), "device": asdict(device), "rows": lines}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    bandwidth, rate = device.bandwidth_bytes_per_second / 1e9, device.rate(_DTYPE) / 1e9
    print(f"measured: {bandwidth:.1f} GB/s, {rate:.0f} Gflop/s in {_DTYPE}\n")
    print_table(
        ["what", "predicted ms", "measured ms", "error", "the longest part waits for"],
        [
            [
                row.what,
                f"{row.predicted_ms:.1f}",
                f"{row.measured_ms:.1f}",
                f"{100 * row.error:+.0f} %",
                row.waits_for,
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
