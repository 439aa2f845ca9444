"""What `gpu.py` checks and times: every Triton kernel on random caches in shuffled pages, its cost, and what it is
compared with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from foveal.config.formats import PAGE_SIZE, index_key_bytes, latent_bytes
from foveal.kernels import (
    Columns,
    Contexts,
    KeySource,
    OneHead,
    Queries,
    Rows,
    attention,
    experts,
    index_divergence,
    quantise_index,
    select,
    sparse_attention,
    sparse_gradients,
    write_index_keys,
    write_latents,
)
from foveal.kernels.records import IndexKeyRecords, LatentRecords

SCALE = 0.07


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V3.2's attention, a grouped-query model's, and how much of each."""

    batch: int = 64
    context: int = 131072
    chunk: int = 1024
    """Queries of a prefill, at the end of the context."""
    train: int = 4096
    """Tokens of a training batch, one sequence."""
    heads: int = 128
    rank: int = 512
    rope: int = 64
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048
    groups: int = 8
    group: int = 4
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel on one input."""

    name: str
    run: Callable[[str], Any]
    """Runs a version of the operation, by name."""
    flops: float = 0.0
    bytes_: float = 0.0
    rate: str = "bf16"
    """Which matrix-product ceiling binds: "bf16" or "fp8"."""
    baseline: tuple[str, Callable[[], Any]] | None = None
    """Something to compare with, and its name; None: the operation in torch."""
    plain: str = "torch"
    """The version that is the operation in torch."""
    exact: bool = False
    """Whether results must be equal, not only close."""
    selects: int = 0
    """The top-k, where results are selections: equal but for scores at the edge."""


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """One after another, so that the memory of one is free before the next."""
    yield from _selecting(sizes, device)
    yield from _latent(sizes, device)
    yield from _grouped(sizes, device)
    yield from _experts(sizes, device)
    yield from _rounding(sizes, device)
    yield from _training(sizes, device)


def pages(sizes: Sizes, sequences: int, device: torch.device) -> Contexts:
    """Every sequence's pages in random order, as a cache in use has them."""
    count = -(-sizes.context // PAGE_SIZE)
    order = torch.randperm(sequences * count, device=device) + 1
    return Contexts.paged(order.view(sequences, count), [sizes.context] * sequences)


def decoding(sizes: Sizes, sequences: int) -> Queries:
    """One query a sequence, the last of its context."""
    return Queries(tuple(range(sequences + 1)), (sizes.context - 1,) * sequences)


def prefill(sizes: Sizes) -> Queries:
    """The last queries of one sequence."""
    return Queries((0, sizes.chunk), (sizes.context - sizes.chunk,))


def latent_sources(sizes: Sizes, contexts: Contexts, *, fp8: bool, device: torch.device) -> tuple[KeySource, KeySource]:
    """Keys and values of a filled latent cache."""
    width = sizes.rank + sizes.rope
    count = (1 + len(contexts.lengths) * -(-sizes.context // PAGE_SIZE)) * PAGE_SIZE
    if fp8:
        size = latent_bytes(sizes.rank, sizes.rope, "fp8")
        bytes_ = torch.empty(count, size, dtype=torch.uint8, device=device)
        records: Any = LatentRecords(bytes_, sizes.rank, sizes.dtype)
        _fill(records.write, count, width, sizes.dtype, device)
    else:
        records = Rows(torch.randn(count, width, dtype=sizes.dtype, device=device))
    keys = KeySource(OneHead(records), contexts)
    return keys, KeySource(Columns(keys.records, sizes.rank), contexts)


def index_source(sizes: Sizes, contexts: Contexts, stored: str, device: torch.device) -> KeySource:
    """A filled cache of index keys."""
    count = 1 + len(contexts.lengths) * -(-sizes.context // PAGE_SIZE)
    size = PAGE_SIZE * index_key_bytes(sizes.index_dim, stored)
    records = IndexKeyRecords(torch.empty(count, size, dtype=torch.uint8, device=device), sizes.index_dim, stored)
    _fill(records.write, count * PAGE_SIZE, sizes.index_dim, sizes.dtype, device)
    return KeySource(records, contexts)


def _fill(
    write: Callable[[Tensor, Tensor], Any], count: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    for start in range(0, count, 1 << 16):
        rows = torch.arange(start, min(start + (1 << 16), count), device=device)
        write(rows, torch.randn(len(rows), width, dtype=dtype, device=device))


def random_selection(queries: int, context: int, topk: int, device: torch.device) -> Tensor:
    """int32 [queries, topk]: ascending positions, one of each stretch of the context: the worst case of a gather."""
    kept = min(topk, context)
    step = context // kept
    place = torch.arange(kept, device=device) * step
    chosen = place + torch.randint(0, step, (queries, kept), device=device)
    return torch.nn.functional.pad(chosen, (0, topk - kept), value=-1).int()


def _selecting(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    decode, chunk = decoding(sizes, sizes.batch), prefill(sizes)
    plans = [
        ("decode", sizes.batch, decode, "fp8"),
        ("decode", sizes.batch, decode, "int8"),
        ("prefill", 1, chunk, "fp8"),
    ]
    for name, sequences, queries, stored in plans:
        keys = index_source(sizes, pages(sizes, sequences, device), stored, device)
        count = queries.offsets[-1]
        q, scales = quantise_index(
            torch.randn(count, sizes.index_heads, sizes.index_dim, dtype=sizes.dtype, device=device), stored
        )
        weights = torch.randn(count, sizes.index_heads, device=device) * scales
        flops = 2.0 * count * sizes.context * sizes.index_heads * sizes.index_dim
        yield Case(
            f"score and select, {name}, {stored} keys",
            lambda version, q=q, w=weights, k=keys, s=queries: select(q, w, k, s, topk=sizes.topk, version=version),
            flops,
            float(sequences * sizes.context * index_key_bytes(sizes.index_dim, stored)),
            "fp8" if stored == "fp8" else "bf16",
            selects=sizes.topk,
        )
    # One head of a few numbers: nearly nothing but the selection is left.
    few = replace(sizes, index_heads=1, index_dim=32)
    keys = index_source(few, pages(few, sizes.batch, device), "fp8", device)
    q, scales = quantise_index(torch.randn(sizes.batch, 1, 32, dtype=sizes.dtype, device=device), "fp8")
    weights, scores = scales, torch.randn(sizes.batch, sizes.context, device=device)
    yield Case(
        "select, nearly alone",
        lambda version: select(q, weights, keys, decode, topk=sizes.topk, version=version),
        bytes_=float(sizes.batch * sizes.context * index_key_bytes(32, "fp8")),
        baseline=("torch.topk", lambda: scores.topk(min(sizes.topk, sizes.context))),
        selects=sizes.topk,
    )


def _latent(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    macs = sizes.heads * (2 * sizes.rank + sizes.rope)
    kept = min(sizes.topk, sizes.context)
    plans = [("decode", sizes.batch, decoding(sizes, sizes.batch)), ("prefill", 1, prefill(sizes))]
    for name, sequences, queries in plans:
        count = queries.offsets[-1]
        q = torch.randn(count, sizes.heads, sizes.rank + sizes.rope, dtype=sizes.dtype, device=device)
        selection = random_selection(count, sizes.context - count, sizes.topk, device)
        for fp8 in (True, False):
            keys, values = latent_sources(sizes, pages(sizes, sequences, device), fp8=fp8, device=device)
            row = latent_bytes(sizes.rank, sizes.rope, "fp8" if fp8 else str(sizes.dtype).removeprefix("torch."))
            stored = "fp8 records" if fp8 else "plain latents"
            yield Case(
                f"sparse MLA, {name}, {stored}",
                lambda version, q=q, k=keys, v=values, c=selection, s=queries: sparse_attention(
                    q, k, v, c, s, scale=SCALE, version=version
                ),
                2.0 * count * kept * macs,
                float(count * kept * row if name == "decode" else min(count * kept, sizes.context) * row),
            )
            if name == "decode":
                yield Case(
                    f"dense MLA, {name}, {stored}",
                    lambda version, q=q, k=keys, v=values, s=queries: attention(
                        q, k, v, s, scale=SCALE, version=version
                    ),
                    2.0 * count * sizes.context * macs,
                    float(count * sizes.context * row),
                )


def _grouped(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for name, sequences, queries in (("decode", sizes.batch, 1), ("prefill", 1, sizes.chunk)):
        length = max(queries, sizes.context // 8)
        own = replace(sizes, context=length)
        contexts = pages(own, sequences, device)
        table = contexts.table_SB
        assert table is not None
        shape = ((1 + table.numel()) * PAGE_SIZE, sizes.groups, sizes.head_dim)
        keys, values = (
            KeySource(Rows(torch.randn(shape, dtype=sizes.dtype, device=device)), contexts) for _ in range(2)
        )
        heads = sizes.groups * sizes.group
        q = torch.randn(sequences * queries, heads, sizes.head_dim, dtype=sizes.dtype, device=device)
        whose = Queries(tuple(range(0, sequences * queries + 1, queries)), (length - queries,) * sequences)
        seen = queries * (length - queries) + queries * (queries + 1) // 2
        shapes = ((heads, queries), (sizes.groups, length), (sizes.groups, length))
        sdpa_q, sdpa_k, sdpa_v = (
            torch.randn(sequences, *own_shape, sizes.head_dim, dtype=sizes.dtype, device=device) for own_shape in shapes
        )
        mask = None
        if queries > 1:
            mask = torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)
        yield Case(
            f"grouped attention, {name}",
            lambda version, q=q, k=keys, v=values, s=whose: attention(q, k, v, s, scale=SCALE, version=version),
            4.0 * sequences * seen * heads * sizes.head_dim,
            float(2 * sequences * length * sizes.groups * sizes.head_dim * q.element_size()),
            baseline=(
                "torch SDPA, unpaged",
                lambda q=sdpa_q, k=sdpa_k, v=sdpa_v, mask=mask: scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True
                ),
            ),
        )
        selection = random_selection(sequences * queries, max(1, length - queries), sizes.topk, device)
        kept = int((selection[0] >= 0).sum())
        rows = sequences * (kept if queries == 1 else min(queries * kept, length))
        yield Case(
            f"sparse grouped attention, {name}",
            lambda version, q=q, k=keys, v=values, c=selection, s=whose: sparse_attention(
                q, k, v, c, s, scale=SCALE, version=version
            ),
            4.0 * sequences * queries * kept * heads * sizes.head_dim,
            float(2 * rows * sizes.groups * sizes.head_dim * q.element_size()),
        )


def _experts(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """A decode step: DeepSeek-V3's widths (7168 and 2048 at its rank of 512), a quarter of its experts."""
    count, chosen_by_each, width, inner = 64, 8, 14 * sizes.rank, 4 * sizes.rank
    gate_up = torch.randn(count, 2 * inner, width, device=device).to(sizes.dtype) * width**-0.5
    down = torch.randn(count, width, inner, device=device).to(sizes.dtype) * inner**-0.5
    x = torch.randn(sizes.batch, width, device=device).to(sizes.dtype)
    weights, chosen = torch.rand(sizes.batch, count, device=device).topk(chosen_by_each)
    read = len(chosen.unique())
    yield Case(
        "experts, decode",
        lambda version: experts(x, weights, chosen, gate_up, down, silu, version=version),
        6.0 * sizes.batch * chosen_by_each * width * inner,
        float(3 * read * width * inner * x.element_size()),
    )


def _rounding(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    count, width = 8 * sizes.chunk, sizes.rank + sizes.rope
    rows = torch.randperm(2 * count, device=device)[:count]
    x = torch.randn(count, sizes.index_heads, sizes.index_dim, dtype=sizes.dtype, device=device)
    item = x.element_size()
    yield Case(
        "turn and round index queries",
        lambda version: quantise_index(x, "fp8", version=version)[0].view(torch.uint8),
        bytes_=float(x.numel() * (item + 1)),
        plain="reference",
        exact=True,
    )
    keys = x[:, 0]
    stored = torch.zeros(
        -(-2 * count // 64), 64 * index_key_bytes(sizes.index_dim, "fp8"), dtype=torch.uint8, device=device
    )

    def write_keys(version: str) -> Tensor:
        write_index_keys(keys, rows, stored, "fp8", version=version)
        return stored

    yield Case("write index keys", write_keys, bytes_=float(keys.numel() * (item + 1)), plain="reference", exact=True)
    latents = torch.randn(count, width, dtype=sizes.dtype, device=device)
    size = latent_bytes(sizes.rank, sizes.rope, "fp8")
    records = torch.zeros(2 * count, size, dtype=torch.uint8, device=device)

    def write_rows(version: str) -> Tensor:
        write_latents(latents, rows, records, sizes.rank, version=version)
        return records

    yield Case("write latents", write_rows, bytes_=float(count * (width * item + size)), plain="reference", exact=True)


def _training(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    tokens, width = sizes.train, sizes.rank + sizes.rope
    kept = min(sizes.topk, tokens)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, dtype=sizes.dtype, device=device)

    q, latents = numbers(sizes.heads, width), numbers(1, width)
    out, d_out = numbers(sizes.heads, sizes.rank), numbers(sizes.heads, sizes.rank)
    rows = random_selection(tokens, tokens, sizes.topk, device).long()
    yield Case(
        "sparse MLA backward",
        lambda version: sparse_gradients(
            q, latents, latents[..., : sizes.rank], out, d_out, rows, scale=SCALE, version=version
        ),
        2.0 * tokens * kept * sizes.heads * (3 * width + 2 * sizes.rank),
        plain="reference",
    )
    contexts, queries = Contexts.packed([tokens]), Queries((0, tokens), (0,))
    q_index, k_index = numbers(sizes.index_heads, sizes.index_dim), numbers(sizes.index_dim)
    weights, token_weights = torch.randn(tokens, sizes.index_heads, device=device), torch.ones(tokens, device=device)
    sources = KeySource(Rows(k_index), contexts), q, KeySource(Rows(latents), contexts)
    seen = tokens * (tokens + 1) // 2
    yield Case(
        "indexer's warm-up loss",
        lambda version: index_divergence(
            q_index, weights, *sources, queries, token_weights, scale=SCALE, version=version
        ),
        2.0 * seen * (sizes.heads * width + 3 * sizes.index_heads * sizes.index_dim),
        plain="tiled",
    )
    selection = rows.int()
    yield Case(
        "indexer's loss over a selection",
        lambda version: index_divergence(
            q_index, weights, *sources, queries, token_weights, scale=SCALE, selection_TK=selection, version=version
        ),
        2.0 * tokens * kept * (sizes.heads * width + 3 * sizes.index_heads * sizes.index_dim),
        plain="tiled",
    )
