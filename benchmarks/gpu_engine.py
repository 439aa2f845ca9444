"""Decode steps on a GPU: the engine with CUDA graphs, beside itself without them and beside transformers.

Models: SmolLM2-135M at batch 1 and 64, and the random deepseek_v32 with 29M parameters of vs_transformers.py, whose
steps are so small that starting their kernels is most of the work. transformers runs with the fastest of its
attentions, experts and caches for each case, without torch.compile. The three take turns, in one process.

python benchmarks/gpu_engine.py [--context 512] [--steps 50] [--only SmolLM2-135M] [--json]

Without a CUDA device nothing is measured: one line says so, and the exit code is 2. `--device cpu` tries the script.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from oracle import load_transformers
from report import circumstances, print_table
from vs_transformers import Case, FovealSide, TransformersSide, fastest_setup, random_dsa

from foveal import LLM
from foveal.models.resolve import resolve_model

HEADER = ("model", "batch", "context", "graphs ms", "eager ms", "transformers ms", "over eager", "over transformers")
_WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """Medians of one case, in milliseconds a step."""

    model: str
    batch: int
    context: int
    graphs_ms: float
    eager_ms: float
    transformers_ms: float
    transformers_setup: str

    @property
    def cells(self) -> list[str]:
        """As they are printed."""
        times = self.graphs_ms, self.eager_ms, self.transformers_ms
        ratios = (f"{other / self.graphs_ms:.1f}" for other in times[1:])
        return [self.model, str(self.batch), str(self.context), *(f"{ms:.2f}" for ms in times), *ratios]


def measure(name: str, path: Path, case: Case, steps: int, device: torch.device) -> Row:
    """One model at one batch size."""
    loading = {"dtype": "bfloat16", "device": device, "skip_tokenizer_init": True, "enable_prefix_caching": False}
    tokens = _WARM_UP + steps
    # The first to be done with its prompt decodes while the others are not.
    starting = 2 + case.batch * (1 + case.length // 1024)
    room = {"max_num_seqs": case.batch, "max_model_len": case.length + tokens + starting}
    engines = [LLM(str(path), enforce_eager=eager, **loading, **room) for eager in (False, True)]
    model = load_transformers(path, torch.bfloat16).to(device)
    prompts = case.prompts(model.config.vocab_size)
    setup = fastest_setup(model, prompts, 5)
    sides = [*map(FovealSide, engines), TransformersSide(model, setup, room=tokens)]
    for side in sides:
        side.start(prompts)
    for _ in range(_WARM_UP):  # kernels are compiled and graphs captured
        for side in sides:
            side.step()
    times = zip(*([side.step() for side in sides] for _ in range(steps)), strict=True)
    graphs, eager, theirs = (statistics.median(side) for side in times)
    return Row(name, case.batch, case.length, graphs, eager, theirs, f"{setup.decode}, {setup.cache} cache")


def rows(only: str | None, context: int, steps: int, device: torch.device) -> Iterator[Row]:
    """All cases, or those of one model."""
    with tempfile.TemporaryDirectory() as folder:
        models = [("DSA-29M", random_dsa(Path(folder)), (1,)), ("SmolLM2-135M", resolve_model("smollm2"), (1, 64))]
        for name, path, batches in models:
            for batch in batches if only in (None, name) else ():
                yield measure(name, path, Case(batch, context), steps, device)
                gc.collect()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=50, help="decode steps of each side")
    parser.add_argument("--only", choices=["SmolLM2-135M", "DSA-29M"], help="one of the two models")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: the engine on a GPU is not measured", file=sys.stderr)
        raise SystemExit(2)
    found = list(rows(arguments.only, arguments.context, arguments.steps, arguments.device))
    facts = circumstances()
    if arguments.device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(arguments.device), "cuda": torch.version.cuda}
    if arguments.json:
        print(json.dumps({"circumstances": facts, "rows": [asdict(row) for row in found]}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(HEADER, [row.cells for row in found])


if __name__ == "__main__":
    main()
