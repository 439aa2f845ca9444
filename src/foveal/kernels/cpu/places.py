"""Where the compiled kernels find queries and keys: `Queries` and `Contexts` as addresses."""

from foveal.kernels.cpu.library import address
from foveal.kernels.keys import Contexts, Queries


def sequence_arguments(queries: Queries, contexts: Contexts) -> tuple[int, int, int, int, int]:
    """The arguments of `sequences_at` in csrc/bindings/sequences.h: count, queries, contexts, table, its stride.

    The addresses live as long as `queries` and `contexts` do. ValueError where they are not of the same sequences.
    """
    table_SB = contexts.table_SB
    sequences = len(queries.positions)
    if len(contexts.lengths) != sequences or (table_SB is not None and len(table_SB) < sequences):
        raise ValueError(f"queries of {sequences} sequences, but contexts of {len(contexts.lengths)}")
    stride = 0 if table_SB is None else table_SB.stride(0)
    return sequences, address(queries.block), address(contexts.block), address(table_SB), stride
