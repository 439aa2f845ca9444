"""Tokens a second of SmolLM2-135M on a CPU: foveal in bf16, int8 and int4 beside transformers and llama.cpp.

transformers runs in bf16. llama.cpp runs in a process of its own, with --llama-python: a Python that has
llama-cpp-python (it is compiled from source), which is no dependency of this project:

    python -m venv llama && llama/bin/pip install llama-cpp-python numpy
    python benchmarks/cpu_decode.py --llama-python llama/bin/python

Its F16, Q8_0 and Q4_0 files are made from the very weights that foveal loads. All take turns, a few steps each, with
the same threads and prompts. The bound is what reading the weights once a step takes at the bandwidth measured here.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from oracle import load_transformers
from report import circumstances, print_table
from transformers import PreTrainedModel
from vs_transformers import Case, FovealSide, Implementation, Setup, Side, TransformersSide

from foveal import LLM
from foveal.models import load_model
from foveal.models.resolve import resolve_model
from foveal.nn.linear import Linear

# What foveal calls a width, and llama.cpp.
_WIDTHS = {"bf16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
_PREFILL, _CONTEXT = 512, 128
_READ_BYTES = 2**29
_ROOM: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 8, "skip_tokenizer_init": True}
_SDPA = Implementation("sdpa", None)


@dataclass(frozen=True)
class Row:
    """One line of the table: tokens a second, medians."""

    what: str
    width: str
    threads: int
    foveal: float
    transformers: float
    llama: float | None
    bound: float | None
    """Tokens a second at which the weights pass once a step; None for a prefill, which arithmetic bounds."""

    def ratio(self, other: float | None) -> float | None:
        """How many times faster foveal is."""
        return self.foveal / other if other else None


class LlamaSide:
    """llama.cpp in its own process (`Side`); milliseconds are measured there."""

    def __init__(self, python: str, source: Path, kind: str) -> None:
        worker = Path(__file__).with_name("llama_worker.py")
        command = [python, str(worker), str(source), kind]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()["version"]

    def start(self, prompts: list[list[int]]) -> float:
        """See `Side`."""
        return self._ask({"start": prompts, "threads": torch.get_num_threads()})

    def step(self) -> float:
        """See `Side`."""
        return self._ask({"step": True})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, command: dict[str, Any]) -> float:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        milliseconds: float = self._answer()["ms"]
        return milliseconds

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the llama.cpp process ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Effort:
    """How often everything is repeated: prefills, turns of decoding, and steps a turn."""

    prefills: int
    turns: int
    steps: int


def measure(sides: Sequence[Side], case: Case, vocabulary: int, effort: Effort) -> list[float]:
    """Milliseconds of a decode step of each side, medians; they take turns."""
    for side in sides:
        side.start(case.prompts(vocabulary))
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(effort.turns):
        for side, own in zip(sides, times, strict=True):
            side.step()  # not counted: the caches and threads are still another's
            own += [side.step() for _ in range(effort.steps)]
    return [statistics.median(own) for own in times]


def measure_prefill(sides: Sequence[Side], case: Case, vocabulary: int, effort: Effort) -> list[float]:
    """Milliseconds that each side takes for the prompts, medians of all but the first time; they take turns."""
    rounds = [[side.start(case.prompts(vocabulary)) for side in sides] for _ in range(effort.prefills + 1)]
    return [statistics.median(own) for own in zip(*rounds[1:], strict=True)]


def read_bandwidth() -> float:
    """Bytes a second at which these threads read memory, the best of several."""
    memory = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        memory.max()
        times.append(time.perf_counter() - start)
    return _READ_BYTES / min(times)


def weight_bytes(quantization: str | None) -> int:
    """Bytes of the weights that a step of one token reads: all linear layers, and the head. That is tied to the
    embeddings and stored like the layers."""
    decoder = load_model("smollm2", dtype="bfloat16", quantization=quantization)
    layers = [module for module in decoder.modules() if isinstance(module, Linear)]
    weights = [layer.weight if layer.quantised is None else layer.quantised for layer in layers]
    stored = sum(weight.nbytes for weight in weights)
    bytes_each = stored / sum(math.prod(weight.shape) for weight in weights)
    return int(stored + bytes_each * decoder.embed_tokens.weight.numel())


def rows_of(width: str, threads: int, effort: Effort, model: PreTrainedModel, llama: LlamaSide | None) -> list[Row]:
    """The rows of one width."""
    torch.set_num_threads(threads)
    quantization = None if width == "bf16" else width
    seconds = weight_bytes(quantization) / read_bandwidth()
    llm = LLM("smollm2", dtype="bfloat16", quantization=quantization, enable_prefix_caching=False, **_ROOM)
    setup = Setup(_SDPA, _SDPA, "dynamic")
    sides: list[Side] = [FovealSide(llm), TransformersSide(model, setup, room=0), *([llama] if llama else [])]
    rows = []
    for batch in (1, 8):
        times = measure(sides, Case(batch, _CONTEXT), model.config.vocab_size, effort)
        rows.append(Row(f"decode, batch {batch}", width, threads, *_rates(batch, times), batch / seconds))
    times = measure_prefill(sides, Case(1, _PREFILL), model.config.vocab_size, effort)
    rows.append(Row(f"prefill {_PREFILL}", width, threads, *_rates(_PREFILL, times), None))
    return rows


def _rates(tokens: int, times: list[float]) -> tuple[float, float, float | None]:
    ours, transformers, *llama = [tokens * 1e3 / milliseconds for milliseconds in times]
    return ours, transformers, llama[0] if llama else None


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of every side (default: 1, then 2)")
    parser.add_argument(
        "--llama-python", metavar="PATH", help="a Python with llama-cpp-python, for llama.cpp's columns"
    )
    parser.add_argument("--widths", nargs="+", choices=_WIDTHS, default=list(_WIDTHS), help="of foveal and llama.cpp")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    effort = Effort(prefills=1, turns=1, steps=3) if arguments.quick else Effort(prefills=5, turns=5, steps=16)

    path = resolve_model("smollm2")
    if arguments.llama_python and path.suffix != ".gguf":
        parser.error(f"llama.cpp reads GGUF files, and smollm2 is {path} here")
    model = load_transformers(path, torch.bfloat16)
    rows, llama = [], None
    for width in arguments.widths:
        if arguments.llama_python:
            llama = LlamaSide(arguments.llama_python, path, _WIDTHS[width])
        for threads in arguments.threads:
            rows += rows_of(width, threads, effort, model, llama)
        if llama:
            llama.close()
    facts = circumstances() | {"threads": arguments.threads, "llama-cpp-python": llama.version if llama else None}
    print_rows(rows, facts, as_json=arguments.json)


def print_rows(rows: list[Row], facts: dict[str, Any], *, as_json: bool) -> None:
    """The table under the circumstances it was measured in."""
    if as_json:
        print(json.dumps({"circumstances": facts, "rows": [asdict(row) for row in rows]}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    header = ["tokens a second", "width", "threads", "foveal", "llama.cpp", "ratio", "transformers bf16", "ratio"]
    cells = [
        [
            row.what,
            row.width,
            str(row.threads),
            f"{row.foveal:.1f}",
            _cell(row.llama, ".1f"),
            _cell(row.ratio(row.llama), ".2f"),
            f"{row.transformers:.1f}",
            _cell(row.ratio(row.transformers), ".2f"),
            _cell(row.bound, ".0f"),
            _cell(row.ratio(row.bound), ".0%"),
        ]
        for row in rows
    ]
    print_table([*header, "bound", "reached"], cells)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
