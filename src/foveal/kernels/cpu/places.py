"""Where the compiled kernels find queries and keys: `Queries` and `Contexts` as addresses."""

import torch

from foveal.kernels.cpu.library import address
from foveal.kernels.keys import Contexts, Queries


def sequence_arguments(tokens: int, queries: Queries, contexts: Contexts) -> tuple[int, int, int, int, int]:
    """The arguments of `sequences_at` in csrc/bindings/sequences.h: count, queries, contexts, table, its stride.

    The addresses live as long as `queries` and `contexts` do. ValueError where they are not of the same sequences, the
    queries are not these `tokens`, or the table is not int64 with rows one after another.
    """
    table_SB = contexts.table_SB
    sequences = len(queries.positions)
    if len(contexts.lengths) != sequences or (table_SB is not None and len(table_SB) < sequences):
        raise ValueError(f"queries of {sequences} sequences, but contexts of {len(contexts.lengths)}")
    if queries.offsets[0] != 0 or queries.offsets[-1] != tokens:
        raise ValueError(f"{tokens} queries, but their sequences own rows {queries.offsets}")
    if table_SB is None:
        return sequences, address(queries.block), address(contexts.block), 0, 0
    if table_SB.dtype != torch.int64 or table_SB.dim() != 2 or (table_SB.shape[1] > 1 and table_SB.stride(1) != 1):
        raise ValueError(f"the page table is {table_SB.dtype} {tuple(table_SB.shape)}, not int64 [S, B] row by row")
    # A table of one row may have any stride there; what counts is how many pages may be read of each.
    stride = table_SB.shape[1] if sequences == 1 else table_SB.stride(0)
    return sequences, address(queries.block), address(contexts.block), address(table_SB), stride
