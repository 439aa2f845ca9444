"""Attention over per-head keys: packed queries, paged keys, windows, sinks, selections; and plain tensors.

A tile's rows are the heads of a group, query after query, so that grouped heads share each block of keys; over a
selection those of one query alone. Blocks that no row sees (behind the window, after the sinks) are skipped. Decode
cuts the keys into ranges (`combine`).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu.code import LN2, entries_of, row_of, softmax_step
from foveal.kernels.gpu.combine import combine, partial_results
from foveal.kernels.gpu.device import Card, card_of
from foveal.kernels.gpu.launch import AUTO, LOG2_E, Choice, Launch, Tiles, Work, block_size, ceil_div, choose_splits
from foveal.kernels.gpu.places import Places, places
from foveal.kernels.keys import KeySource, Queries, Rows


@triton.jit
def flash_kernel(
    q,
    keys,
    values,
    out,
    lse,
    selection,
    sequence_of,
    queries,
    contexts,
    table,
    table_stride,
    sequences,
    q_token,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H,
    groups,
    tiles,
    splits,
    rows_out,
    window,
    sinks,
    K,
    scale_log2,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SELECTED: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A tile of one group's query rows over one range of keys. Results are divided by their totals; `lse` is to base 2
    where there are several ranges, natural otherwise. Strides in numbers; the last ones are 1."""
    lower = tl.program_id(0) % tiles * BLOCK_M
    group = tl.program_id(0) // tiles % groups
    split = tl.program_id(1)
    s = (tl.program_id(0) // tiles // groups).to(tl.int64)
    if SELECTED:
        first = s
        count = 1
        s = tl.load(sequence_of + first).to(tl.int64)
    else:
        first = tl.load(queries + s)
        count = (tl.load(queries + s + 1) - first).to(tl.int32)
        if lower >= count * GROUP:
            return
    length = tl.load(contexts + s).to(tl.int32)
    start_row = tl.load(contexts + sequences + s)
    table_row = table + s * table_stride
    m = lower + tl.arange(0, BLOCK_M)
    live = m < count * GROUP
    token = first + m // GROUP
    head = group * GROUP + m % GROUP
    stop = entries_of(selection + first * K, K) if SELECTED else length
    low = 0
    sink_blocks = 0
    if CAUSAL:
        position = tl.load(queries + sequences + 1 + s).to(tl.int32)
        position_M = position + m // GROUP
        stop = tl.minimum(position + tl.minimum((lower + BLOCK_M - 1) // GROUP, count - 1) + 1, length)
        if WINDOW:
            # The first block that the first row's window touches, and the blocks of sinks before it.
            sink_blocks = tl.cdiv(tl.minimum(sinks, stop), BLOCK_N)
            low = tl.maximum(position + lower // GROUP + 1 - window, 0) // BLOCK_N
            low = tl.maximum(low - sink_blocks, 0)
    blocks = tl.maximum(tl.cdiv(stop, BLOCK_N) - low, 0)
    share = tl.cdiv(blocks, splits)
    p = tl.arange(0, BLOCK_P)
    v = tl.arange(0, BLOCK_V)
    at = token[:, None] * q_token + head[:, None] * q_head + p[None, :]
    q_MP = tl.load(q + at, mask=live[:, None] & (p < P)[None, :], other=0.0)
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    sum_MV = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for block in range(split * share, tl.minimum((split + 1) * share, blocks)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        if WINDOW:
            n += tl.where(block >= sink_blocks, low * BLOCK_N, 0)
        seen = n < stop
        if SELECTED:
            n = tl.load(selection + first * K + n, mask=seen, other=-1)
            seen = (n >= 0) & (n < length)
        row_N = row_of(n.to(tl.int64), seen, start_row, table_row, PAGED)
        at_NP = row_N[:, None] * k_row + group * k_head + p[None, :]
        k_NP = tl.load(keys + at_NP, mask=seen[:, None] & (p < P)[None, :], other=0.0)
        scores = tl.dot(q_MP, tl.trans(k_NP), input_precision="ieee") * scale_log2
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= position_M[:, None])
        if WINDOW:
            visible = visible & ((n[None, :] > position_M[:, None] - window) | (n[None, :] < sinks))
        scores = tl.where(visible, scores, float("-inf"))
        weights, fade, most_M, total_M = softmax_step(scores, most_M, total_M)
        at_NV = row_N[:, None] * v_row + group * v_head + v[None, :]
        v_NV = tl.load(values + at_NV, mask=seen[:, None] & (v < V)[None, :], other=0.0)
        sum_MV = tl.dot(weights.to(v_NV.dtype), v_NV, sum_MV * fade[:, None], input_precision="ieee")
    nothing = total_M == 0.0
    sum_MV = sum_MV / tl.where(nothing, 1.0, total_M)[:, None]
    lse_M = tl.where(nothing, float("-inf"), most_M + tl.log2(tl.where(nothing, 1.0, total_M)))
    row_M = token * H + head
    if SPLIT:
        row_M += split.to(tl.int64) * rows_out
    else:
        lse_M = lse_M * LN2
    mask = live[:, None] & (v < V)[None, :]
    tl.store(out + row_M[:, None] * V + v[None, :], sum_MV.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row_M, lse_M, mask=live)


@dataclass(frozen=True)
class Chosen:
    """Positions of each query's sequence, int32 [T, K], -1 last, and which sequence that is, int32 [T]."""

    selection_TK: Tensor
    sequence_T: Tensor


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees: all, or those up to it, of these the last `window` and the first `sinks`; or the chosen
    ones alone."""

    causal: bool
    window: int | None
    sinks: int
    chosen: Chosen | None = None


def tiles_for(card: Card, width: int, rows: int, itemsize: int) -> Tiles:
    """Tiles whose queries and keys fit into the card's shared memory (docs/gpu.md). rows: those that share keys."""
    tile = min(16 if itemsize > 2 else 128 if width <= 128 else 64, block_size(rows))
    if itemsize > 2:
        return Tiles(tile, 32 if width <= 128 else 16, 4, 1)
    keys = 64 if width <= 128 or card.roomy else 32
    stages = 2 if width <= 128 else 1
    return Tiles(tile, keys, 8 if tile == 128 else 4, stages + 1 if card.roomy and width <= 128 else stages)


def selected_tiles_for(width: int, rows: int, itemsize: int) -> Tiles:
    """Tiles over a selection. rows: the heads of a group.

    Mostly these are fewer than the 16 of a product, whose other rows are padding. That costs no time: a byte of keys
    or values then takes 16 operations, and every card can do 70 and more while it reads one. What counts is how many
    bytes are on their way: blocks of 32 KiB, two or more of them on a multiprocessor of every card. Of four stages the
    compiler gives one to each link of the chain: entries of the selection, their pages, their rows.
    """
    if itemsize > 2:
        return Tiles(16, 32 if width <= 128 else 16, 4, 1)
    most = 64 * 128 // max(128, block_size(width))
    return Tiles(min(most, block_size(rows)), most, 4, 4)


def packed_attention(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    seen: Seen,
    choice: Choice = AUTO,
) -> Work:
    """Plan `attention` over plain rows [R, G, P] and [R, G, V] at the same places.

    ValueError where shapes do not fit.
    """
    assert isinstance(keys.records, Rows) and isinstance(values.records, Rows)
    where = places(queries, keys.contexts, len(q_THP), q_THP.device)
    blocks = max(keys.contexts.lengths, default=0), max(queries.lengths, default=0)
    return _plan(q_THP, keys.records.values, values.records.values, where, blocks, scale, seen, choice)


def selected_attention(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    selection_TK: Tensor,
    queries: Queries,
    *,
    scale: float,
    choice: Choice = AUTO,
) -> Work:
    """Plan `sparse_attention` (int32 selections) over plain rows [R, G, P] and [R, G, V] at the same places.

    Entries that are no position of their sequence count as -1: looking for them would make the host wait. ValueError
    where shapes do not fit.
    """
    assert isinstance(keys.records, Rows) and isinstance(values.records, Rows)
    where = places(queries, keys.contexts, len(q_THP), q_THP.device)
    seen = Seen(False, None, 0, Chosen(selection_TK.contiguous(), queries.sequence_on(q_THP.device)))
    # Each query is alone with its keys.
    longest = selection_TK.shape[1], 1
    return _plan(q_THP, keys.records.values, values.records.values, where, longest, scale, seen, choice)


def plain_attention(
    q_STHP: Tensor,
    k_SNGP: Tensor,
    v_SNGV: Tensor,
    *,
    scale: float,
    seen: Seen,
    choice: Choice = AUTO,
) -> Work:
    """Plan `flash_forward`: results are [S T, H, V] and [S T, H]."""
    (sequences, queries), keys = q_STHP.shape[:2], k_SNGP.shape[1]
    device = q_STHP.device
    offsets_S = torch.arange(sequences + 1, device=device) * queries
    positions_S = torch.full((sequences,), keys - queries, device=device)
    contexts = torch.cat((torch.full_like(positions_S, keys), torch.arange(sequences, device=device) * keys))
    where = Places(sequences, torch.cat((offsets_S, positions_S)), contexts, None)
    q_THP, k_RGP, v_RGV = (x.flatten(0, 1) for x in (q_STHP, k_SNGP, v_SNGV))
    return _plan(q_THP, k_RGP, v_RGV, where, (keys, queries), scale, seen, choice)


def _plan(
    q_THP: Tensor,
    k_RGP: Tensor,
    v_RGV: Tensor,
    where: Places,
    longest: tuple[int, int],
    scale: float,
    seen: Seen,
    choice: Choice,
) -> Work:
    tokens, heads, width = q_THP.shape
    groups, value_width = v_RGV.shape[1:]
    if k_RGP.shape[1:] != (groups, width) or not groups or heads % groups:
        shapes = f"q {tuple(q_THP.shape)}, keys {tuple(k_RGP.shape)}, values {tuple(v_RGV.shape)}"
        raise ValueError(f"heads or dimensions do not match: {shapes}")
    q_THP, k_RGP, v_RGV = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THP, k_RGP, v_RGV))
    card = choice.card or card_of(q_THP.device)
    group, (keys, queries), chosen = heads // groups, longest, seen.chosen
    sizes = max(width, value_width), group * queries, q_THP.element_size()
    tiles = choice.tiles or (selected_tiles_for(*sizes) if chosen else tiles_for(card, *sizes))
    tiles_each = ceil_div(group * queries, tiles.rows)
    programs = tiles_each * groups * (where.sequences if chosen is None else tokens)
    visible = min(keys, seen.window + seen.sinks + queries) if seen.window else keys
    splits = choice.splits or choose_splits(programs, ceil_div(visible, tiles.keys), card.processors)
    out_THV = q_THP.new_empty(tokens, heads, value_width)
    lse_TH = q_THP.new_empty(tokens, heads, dtype=torch.float32)
    partial, partial_lse = (out_THV, lse_TH) if splits == 1 else partial_results(splits, out_THV)
    launch = Launch(
        flash_kernel,
        (programs, splits),
        {
            "q": q_THP,
            "keys": k_RGP,
            "values": v_RGV,
            "out": partial,
            "lse": partial_lse,
            "selection": where.queries if chosen is None else chosen.selection_TK,
            "sequence_of": where.queries if chosen is None else chosen.sequence_T,
            "q_token": q_THP.stride(0),
            "q_head": q_THP.stride(1),
            "k_row": k_RGP.stride(0),
            "k_head": k_RGP.stride(1),
            "v_row": v_RGV.stride(0),
            "v_head": v_RGV.stride(1),
            "H": heads,
            "groups": groups,
            "tiles": tiles_each,
            "splits": splits,
            "rows_out": tokens * heads,
            "window": seen.window or 0,
            "sinks": seen.sinks,
            "K": 0 if chosen is None else keys,
            "scale_log2": scale * LOG2_E,
            **where.arguments(),
        },
        {
            "GROUP": group,
            "P": width,
            "V": value_width,
            "CAUSAL": seen.causal,
            "WINDOW": seen.window is not None,
            "SELECTED": chosen is not None,
            "SPLIT": splits > 1,
            "PAGED": where.paged,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.keys,
            "BLOCK_P": block_size(width),
            "BLOCK_V": block_size(value_width),
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )
    last = () if splits == 1 else (combine(partial, partial_lse, out_THV, lse_TH),)
    return Work((launch, *last), out_THV, lse_TH)
