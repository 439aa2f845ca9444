"""Packed and paged keys for kernel tests."""

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels import Contexts, KeySource, Queries, Rows

CASES = {
    "prefill": ([9, 1, 70], [9, 1, 70]),
    "chunk": ([3, 40], [130, 75]),
    "decode": ([1, 1, 1], [5, 200, 64]),
    "one": ([1], [77]),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def source(values: list[Tensor], paged: bool) -> KeySource:
    """The rows of each sequence, packed, or scattered over the pages of a shuffled cache full of NaN elsewhere."""
    lengths = [len(value) for value in values]
    if not paged:
        return KeySource(Rows(torch.cat(values)), Contexts.packed(lengths))
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()
    pages = torch.full((sum(counts) + 1, PAGE_SIZE, *values[0].shape[1:]), torch.nan, dtype=values[0].dtype)
    table_SB = torch.zeros(len(values), max(counts), dtype=torch.int64)
    for s, (value, count) in enumerate(zip(values, counts, strict=True)):
        table_SB[s, :count] = torch.tensor([order.pop() for _ in range(count)])
        for position, row in enumerate(value):
            pages[table_SB[s, position // PAGE_SIZE], position % PAGE_SIZE] = row
    return KeySource(Rows(pages.flatten(0, 1)), Contexts.paged(table_SB, lengths))


def keys_and_values(
    lengths: list[int], groups: int, widths: tuple[int, int], paged: bool
) -> tuple[KeySource, KeySource]:
    """Random rows [groups, width] behind one table; what no sequence owns is NaN."""
    both = source([torch.randn(length, groups, sum(widths)) for length in lengths], paged)
    assert isinstance(both.records, Rows)
    keys, values = (KeySource(Rows(part), both.contexts) for part in both.records.values.split(list(widths), -1))
    return keys, values


def make_queries(counts: list[int], lengths: list[int]) -> Queries:
    offsets = torch.tensor([0, *counts]).cumsum(0).tolist()
    return Queries(tuple(offsets), tuple(n - t for t, n in zip(counts, lengths, strict=True)))


def random_selection(counts: list[int], lengths: list[int], topk: int) -> Tensor:
    """Ascending random positions that each query may see, -1 last; sometimes fewer than topk."""
    rows = []
    for count, length in zip(counts, lengths, strict=True):
        for position in range(length - count, length):
            chosen = torch.randperm(position + 1)[: torch.randint(1, topk + 1, ())].sort().values
            rows.append(torch.nn.functional.pad(chosen, (0, topk - len(chosen)), value=-1))
    return torch.stack(rows).int()


def close(result: Tensor, expected: Tensor, slack: float = 0.0) -> None:
    """slack: more than results of this dtype may be off, where the inputs make their rounding matter."""
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[result.dtype] + slack, error
