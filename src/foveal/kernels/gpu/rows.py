"""Rows of a selection: where each selected position is stored, looked up once for all heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu.code import row_of
from foveal.kernels.gpu.launch import Argument, Launch, block_size
from foveal.kernels.gpu.places import Places
from foveal.kernels.keys import Queries


@triton.jit
def rows_kernel(
    selection,
    rows,
    stops,
    sequence_of,
    queries,
    contexts,
    table,
    table_stride,
    sequences,
    K,
    PAGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of one query's entries, -1 where an entry is no position of its sequence, and the number of entries up to
    the last that is one."""
    token = tl.program_id(0).to(tl.int64)
    s = tl.load(sequence_of + token).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    position = tl.load(selection + token * K + k, mask=k < K, other=-1).to(tl.int64)
    seen = (position >= 0) & (position < tl.load(contexts + s))
    row = row_of(position, seen, tl.load(contexts + sequences + s), table + s * table_stride, PAGED)
    tl.store(rows + token * K + k, tl.where(seen, row, -1).to(tl.int32), mask=k < K)
    tl.store(stops + token, tl.max(tl.where(seen, k + 1, 0), 0))


def selected_rows(selection_TK: Tensor, queries: Queries, where: Places) -> tuple[Launch, Tensor, Tensor]:
    """Plan the lookup: the launch, rows (int32 [T, K]) and each query's number of entries (int32 [T])."""
    selection_TK = selection_TK.contiguous()
    (tokens, count), device = selection_TK.shape, selection_TK.device
    rows_TK, stops_T = torch.empty_like(selection_TK), torch.empty(tokens, dtype=torch.int32, device=device)
    arguments: dict[str, Argument] = {
        "selection": selection_TK,
        "rows": rows_TK,
        "stops": stops_T,
        "sequence_of": queries.sequence_on(device),
        "K": count,
        **where.arguments(),
    }
    constants = {"PAGED": where.paged, "BLOCK_K": block_size(count)}
    return Launch(rows_kernel, (tokens,), arguments, constants), rows_TK, stops_T
