"""What compiled kernels are told about queries and keys, where it makes no sense."""

import pytest
import torch

from foveal.kernels import Contexts, Queries
from foveal.kernels.cpu.places import sequence_arguments

QUERIES = Queries((0, 1), (69,))


def test_an_unsuitable_table_is_refused() -> None:
    """Page ids of another width, or every other one of a wider table, read as if they were int64 side by side."""
    for table_SB in (torch.tensor([[3, 1]], dtype=torch.int32), torch.arange(8)[None, ::2]):
        with pytest.raises(ValueError, match="page table"):
            sequence_arguments(1, QUERIES, Contexts((70,), (-1,), table_SB))


def test_other_sequences_are_refused() -> None:
    """Reading lengths past the end of the contexts."""
    with pytest.raises(ValueError, match="2 sequences"):
        sequence_arguments(2, Queries((0, 1, 2), (69, 3)), Contexts((70,), (0,)))


def test_other_queries_are_refused() -> None:
    """Rows of q read past its end."""
    with pytest.raises(ValueError, match="3 queries, but their sequences own"):
        sequence_arguments(3, QUERIES, Contexts((70,), (0,)))
