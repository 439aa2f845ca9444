"""One layer's attention core of DeepSeek-V3.2 at any size: random queries and caches, its parts as functions to time,
and what they cost in multiply-accumulates."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.cache.layouts import IndexKeyLayout, PagedLayout, PlainLayout
from foveal.config.formats import PAGE_SIZE
from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, attention, select, sparse_attention
from foveal.kernels.cpu.library import FORMATS, instruction_sets
from foveal.kernels.quantise import quantise_index

RANK, ROPE, NOPE, VALUE, INDEX_DIM, TOPK = 512, 64, 128, 128, 128, 2048
SCALE = (NOPE + ROPE) ** -0.5


@dataclass(frozen=True)
class Core:
    """`count` queries of one sequence, the last of a context of `context` tokens in shuffled pages."""

    heads: int
    index_heads: int
    context: int
    count: int

    @property
    def queries(self) -> Queries:
        """All of them belong to one sequence."""
        return Queries((0, self.count), (self.context - self.count,))

    def contexts(self) -> Contexts:
        """Pages in random order, as a cache in use has them."""
        pages = -(-self.context // PAGE_SIZE)
        return Contexts.paged((torch.randperm(pages) + 1)[None], [self.context])

    def random_queries(self, width: int, heads: int | None = None) -> Tensor:
        """bfloat16 [count, heads, width]."""
        return torch.randn(self.count, heads or self.heads, width, dtype=torch.bfloat16)

    def visible(self) -> int:
        """Keys seen, over all queries."""
        first = self.context - self.count
        return self.count * first + self.count * (self.count + 1) // 2

    def selected(self) -> int:
        """Keys read by sparse attention, over all queries."""
        return sum(min(n, TOPK) for n in range(self.context - self.count + 1, self.context + 1))

    def absorbed_macs(self) -> int:
        """Dense, queries in the latent space."""
        return self.visible() * self.heads * (2 * RANK + ROPE)

    def expanded_macs(self) -> int:
        """Dense, keys and values by head (which have been expanded before)."""
        return self.visible() * self.heads * (NOPE + ROPE + VALUE)

    def index_macs(self) -> int:
        """Index scores."""
        return self.visible() * self.index_heads * INDEX_DIM

    def sparse_macs(self) -> int:
        """Attention over the selection, absorbed."""
        return self.selected() * self.heads * (2 * RANK + ROPE)


def page_count(context: int) -> int:
    """Pages of a cache that holds a context, the null page included."""
    return -(-context // PAGE_SIZE) + 1


def latent_layout(context: int) -> PagedLayout:
    """Latents in bfloat16."""
    return PlainLayout(page_count(context), (RANK + ROPE,), torch.bfloat16, "cpu")


def index_layout(context: int, stored: str, width: int = INDEX_DIM) -> PagedLayout:
    """Index keys as "fp8", "int8" or "bf16"."""
    if stored == "bf16":
        return PlainLayout(page_count(context), (width,), torch.bfloat16, "cpu")
    return IndexKeyLayout(page_count(context), width, stored, "cpu")


def filled(layout: PagedLayout, contexts: Contexts, width: int) -> KeySource:
    """A cache with random rows for every position of the (one) sequence."""
    for start in range(0, contexts.lengths[0], 8192):
        stop = min(start + 8192, contexts.lengths[0])
        rows = contexts.locate(0, torch.arange(start, stop))
        layout.write(rows, torch.randn(stop - start, width, dtype=torch.bfloat16))
    return KeySource(layout.records, contexts)


def dense_absorbed(core: Core, latents: KeySource, version: str | None) -> Callable[[], Any]:
    """Every key, in the latent space."""
    q_THX = core.random_queries(RANK + ROPE)
    keys = KeySource(OneHead(latents.records), latents.contexts)
    values = KeySource(Columns(keys.records, RANK), latents.contexts)
    return lambda: attention(q_THX, keys, values, core.queries, scale=SCALE, **_forced(version))


def sparse(core: Core, latents: KeySource, version: str | None) -> Callable[[], Any]:
    """The keys of a random selection, whose rows lie anywhere: the worst case of a gather."""
    q_THX = core.random_queries(RANK + ROPE)
    keys = KeySource(OneHead(latents.records), latents.contexts)
    values = KeySource(Columns(keys.records, RANK), latents.contexts)
    selection_TK = random_selection(core)
    return lambda: sparse_attention(q_THX, keys, values, selection_TK, core.queries, scale=SCALE, **_forced(version))


def score_and_select(core: Core, keys: KeySource, stored: str, version: str | None) -> Callable[[], Any]:
    """Index scores of every key and the top-k of them."""
    q_TIJ, weights_TI = core.random_queries(INDEX_DIM, core.index_heads), torch.randn(core.count, core.index_heads)
    if stored != "bf16":
        q_TIJ, scale_TI = quantise_index(q_TIJ, stored)
        weights_TI = weights_TI * scale_TI
    return lambda: select(q_TIJ, weights_TI, keys, core.queries, topk=TOPK, **_forced(version))


def nearly_only_select(core: Core, contexts: Contexts) -> Callable[[], Any]:
    """The top-k of scores that cost next to nothing: one index head of two dimensions."""
    keys = filled(index_layout(core.context, "bf16", 2), contexts, 2)
    q_TIJ, weights_TI = core.random_queries(2, 1), torch.ones(core.count, 1)
    return lambda: select(q_TIJ, weights_TI, keys, core.queries, topk=TOPK)


def random_selection(core: Core) -> Tensor:
    """int32 [count, top-k], ascending, -1 last."""
    selection_TK = torch.full((core.count, TOPK), -1, dtype=torch.int32)
    for t in range(core.count):
        visible = core.context - core.count + t + 1
        chosen = torch.randperm(visible)[:TOPK].sort().values
        selection_TK[t, : len(chosen)] = chosen
    return selection_TK


def medians(functions: Sequence[Callable[[], Any]], repetitions: int) -> list[float]:
    """Milliseconds of each, in turns."""
    spent: list[list[float]] = [[] for _ in functions]
    for _ in range(repetitions + 1):
        for function, times in zip(functions, spent, strict=True):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times[1:]) for times in spent]


def peak_gflops(threads: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Multiply-adds on registers, in 10^9 floating-point operations a second: of bf16 where the machine has them, or of
    float32."""
    run = instruction_sets()[-1].run.multiply_registers
    best = 0.0
    for _ in range(5):
        start = time.thread_time()
        macs = run(FORMATS[dtype], 2_000_000)
        best = max(best, 2 * macs / (time.thread_time() - start) / 1e9)
    return best * threads


def _forced(version: str | None) -> dict[str, Any]:
    return {} if version is None else {"version": version}
