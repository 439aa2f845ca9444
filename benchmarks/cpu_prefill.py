"""Prefill with latent attention on a CPU: dense, masked and sparse, compiled and in torch; where does sparse pay?

A chunk of 64 queries (`--queries`) at the end of a context, one layer, in bfloat16. Dense and masked read keys and
values by head that have been expanded before; masked and sparse include the index scores and the selection. For each of
16 and 128 attention heads: V3.2's 64 index heads, and one index head to two attention heads, as V3.2 has them. The last
column is what the engine would run for a chunk of 2048 queries there: it counts the expansion of all keys as well.

python benchmarks/cpu_prefill.py [--threads N] [--contexts 512 ...] [--heads 16 128] [--queries 64] [--no-torch]
    [--json]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from mla_core import (
    INDEX_DIM,
    NOPE,
    RANK,
    ROPE,
    SCALE,
    TOPK,
    VALUE,
    Core,
    filled,
    index_layout,
    latent_layout,
    medians,
    random_selection,
    score_and_select,
    sparse,
)
from report import circumstances, print_table

from foveal.config.model import MLAConfig
from foveal.costs import cheapest_mla_form
from foveal.kernels import Contexts, KeySource, Rows, attention

CONTEXTS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
QUERIES = 64
CHUNK = 2048
FORMS = ("dense", "masked", "sparse")


@dataclass(frozen=True)
class Row:
    """One chunk; milliseconds are medians. masked and sparse are None where nothing is left out."""

    heads: int
    index_heads: int
    context: int
    compiled_ms: dict[str, float]
    torch_ms: dict[str, float]
    macs: dict[str, int]

    @property
    def cheapest(self) -> str:
        """By multiply-accumulates."""
        return min(self.macs, key=lambda form: self.macs[form])

    @property
    def engine(self) -> str:
        """What the engine runs for a chunk of 2048 queries."""
        config = MLAConfig(
            heads=self.heads,
            q_lora_rank=None,
            kv_lora_rank=RANK,
            nope_dim=NOPE,
            rope_dim=ROPE,
            value_dim=VALUE,
            scale=SCALE,
            rope=None,
        )
        return cheapest_mla_form(config, min(CHUNK, self.context), self.context, TOPK)

    @property
    def fastest(self) -> str:
        """By the clock."""
        return min(self.compiled_ms, key=lambda form: self.compiled_ms[form])


def measure(core: Core, *, with_torch: bool, repetitions: int) -> Row:
    """All forms of one chunk in turns in this process."""
    context = core.context
    macs = {"dense": core.expanded_macs()}
    if context > TOPK:
        macs["masked"] = core.expanded_macs() + core.index_macs()
        macs["sparse"] = core.sparse_macs() + core.index_macs()
    versions: list[str | None] = [None, "torch"] if with_torch else [None]
    parts = {(form, version): function for version in versions for form, function in forms(core, version).items()}
    times = dict(zip(parts, medians(list(parts.values()), repetitions), strict=True))
    compiled_ms, torch_ms = (
        {form: spent for (form, version), spent in times.items() if version == wanted} for wanted in (None, "torch")
    )
    return Row(core.heads, core.index_heads, context, compiled_ms, torch_ms, macs)


def forms(core: Core, version: str | None) -> dict[str, Callable[[], Any]]:
    """What is to be timed, by name."""
    packed = Contexts.packed([core.context])
    q_THP = core.random_queries(NOPE + ROPE)
    keys = KeySource(Rows(torch.randn(core.context, core.heads, NOPE + ROPE, dtype=torch.bfloat16)), packed)
    values = KeySource(Rows(torch.randn(core.context, core.heads, VALUE, dtype=torch.bfloat16)), packed)
    forced = {} if version is None else {"version": version}

    def dense() -> Any:
        return attention(q_THP, keys, values, core.queries, scale=SCALE, **forced)

    if core.context <= TOPK:
        return {"dense": dense}
    contexts = core.contexts()
    latents = filled(latent_layout(core.context), contexts, RANK + ROPE)
    index_keys = filled(index_layout(core.context, "fp8"), contexts, INDEX_DIM)
    selecting, attending = score_and_select(core, index_keys, "fp8", version), sparse(core, latents, version)
    selection_TK = random_selection(core)

    def masked() -> Any:
        selecting()
        return attention(q_THP, keys, values, core.queries, scale=SCALE, selection_TK=selection_TK, **forced)

    def selected() -> Any:
        selecting()
        return attending()

    return {"dense": dense, "masked": masked, "sparse": selected}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--queries", type=int, default=QUERIES, help="of the chunk")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true", help="leave the torch versions out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [
        measure(
            Core(heads, index_heads, context, min(arguments.queries, context)),
            with_torch=not arguments.no_torch,
            repetitions=arguments.repetitions,
        )
        for heads in arguments.heads
        for index_heads in sorted({64, heads // 2}, reverse=True)
        for context in sorted(arguments.contexts)
    ]
    print_rows(rows, arguments.queries, as_json=arguments.json)


def print_rows(rows: list[Row], queries: int, *, as_json: bool) -> None:
    """The table under the circumstances it was measured in."""
    if as_json:
        measured = [
            {**asdict(row), "cheapest": row.cheapest, "fastest": row.fastest, "engine": row.engine} for row in rows
        ]
        print(json.dumps({"circumstances": circumstances(), "queries": queries, "rows": measured}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print(f"milliseconds of {queries} queries, and how many times longer the torch version takes")
    print_table(
        ["heads", "index heads", "context", *FORMS, "cheapest by count", "fastest", "engine, chunk of 2048"],
        [
            [str(row.heads), str(row.index_heads), str(row.context)]
            + [_cell(row, form) for form in FORMS]
            + [row.cheapest, row.fastest, row.engine]
            for row in rows
        ],
    )


def _cell(row: Row, form: str) -> str:
    if form not in row.compiled_ms:
        return "-"
    compiled = f"{row.compiled_ms[form]:.1f}"
    return f"{compiled} ({row.torch_ms[form] / row.compiled_ms[form]:.1f}x)" if form in row.torch_ms else compiled


if __name__ == "__main__":
    main()
