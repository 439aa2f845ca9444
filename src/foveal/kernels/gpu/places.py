"""Where the GPU kernels find queries and contexts: small integer tensors on the device, copied once a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels.gpu.launch import Argument
from foveal.kernels.keys import Contexts, Queries


@dataclass(frozen=True)
class Places:
    """Sequences as kernels read them: int64 offsets [S + 1] and positions [S] in one tensor, lengths [S] and first rows
    [S] in another, and the page table, if any."""

    sequences: int
    queries: Tensor
    contexts: Tensor
    table_SB: Tensor | None

    def arguments(self) -> dict[str, Argument]:
        """What every kernel that walks over contexts takes."""
        table = self.contexts if self.table_SB is None else self.table_SB
        stride = 0 if self.table_SB is None else self.table_SB.stride(0)
        return {
            "queries": self.queries,
            "contexts": self.contexts,
            "table": table,
            "table_stride": stride,
            "sequences": self.sequences,
        }

    @property
    def paged(self) -> bool:
        """Whether rows are found through the page table."""
        return self.table_SB is not None


def places(queries: Queries, contexts: Contexts, tokens: int, device: torch.device) -> Places:
    """Raises ValueError unless the sequences own all `tokens` rows, each has a context with its queries in it, and the
    page table is int64, row by row, and wide enough."""
    sequences = len(queries.positions)
    if len(contexts.lengths) != sequences:
        raise ValueError(f"queries of {sequences} sequences, but keys of {len(contexts.lengths)}")
    if queries.offsets[0] != 0 or queries.offsets[-1] != tokens:
        raise ValueError(f"q has {tokens} rows, but its sequences own rows {queries.offsets}")
    for s, (_, count, position) in enumerate(queries):
        if position + count > contexts.lengths[s]:
            raise ValueError(f"sequence {s} has {contexts.lengths[s]} keys, but a query at {position + count - 1}")
    table_SB = contexts.table_SB
    if table_SB is not None:
        _check_table(table_SB, contexts.lengths)
    return Places(sequences, queries.block_on(device), contexts.block_on(device), table_SB)


def _check_table(table_SB: Tensor, lengths: tuple[int, ...]) -> None:
    if table_SB.dtype != torch.int64 or table_SB.dim() != 2 or (table_SB.shape[1] > 1 and table_SB.stride(1) != 1):
        raise ValueError(f"the page table is {table_SB.dtype} {tuple(table_SB.shape)}, not int64 [S, B] row by row")
    if len(table_SB) < len(lengths) or max(lengths, default=0) > table_SB.shape[1] * PAGE_SIZE:
        raise ValueError(f"a page table of shape {tuple(table_SB.shape)} is too small for contexts of {lengths} keys")
