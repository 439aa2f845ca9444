"""Attention over a selection against the reference in float64: absorbed MLA and grouped queries."""

import pytest
import torch
from packing import CASES, close, make_queries, random_selection, source
from torch import Tensor

from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows, attention, sparse_attention
from foveal.kernels.keys import Records


def latent(rows: list[Tensor], paged: bool, rank: int) -> tuple[KeySource, KeySource]:
    """Latent rows [N, P] of each sequence as one head's keys, and their first columns as values."""
    stored = source(rows, paged)
    keys = KeySource(OneHead(stored.records), stored.contexts)
    return keys, KeySource(Columns(keys.records, rank), keys.contexts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_latent(case: str, paged: bool, dtype: torch.dtype) -> None:
    """Gathering the wrong row, or letting a missing entry (-1) count as position 0 or as the last row."""
    counts, lengths = CASES[case]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 6)
    q, k = torch.randn(sum(counts), 4, 12).to(dtype), torch.randn(sum(lengths), 12).to(dtype)
    sources = latent(list(k.split(lengths)), paged, 9)
    result = sparse_attention(q, *sources, selection, queries, scale=0.3)
    sources = latent(list(k.double().split(lengths)), False, 9)
    close(result, sparse_attention(q.double(), *sources, selection, queries, scale=0.3, version="reference"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_grouped(case: str, paged: bool, dtype: torch.dtype) -> None:
    """Heads reading another group's keys, or values narrower than keys."""
    counts, lengths = CASES[case]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 6)
    q, k, v = (
        torch.randn(n, h, p).to(dtype) for n, h, p in ((sum(counts), 6, 8), (sum(lengths), 2, 8), (sum(lengths), 2, 5))
    )
    keys, values = (source(list(x.split(lengths)), paged) for x in (k, v))
    result = sparse_attention(q, keys, values, selection, queries, scale=0.3)
    keys, values = (source(list(x.double().split(lengths)), False) for x in (k, v))
    close(result, sparse_attention(q.double(), keys, values, selection, queries, scale=0.3, version="reference"))


@pytest.mark.parametrize("version", ["reference", "torch"])
def test_equals_masked(version: str) -> None:
    """The two forms over one selection disagreeing (a model would change with the length of its prompt)."""
    counts, lengths = CASES["chunk"]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 9)
    q, k = torch.randn(sum(counts), 4, 12, dtype=torch.float64), torch.randn(sum(lengths), 12, dtype=torch.float64)
    keys, values = latent(list(k.split(lengths)), False, 12)
    masked = attention(q, keys, values, queries, scale=0.3, selection_TK=selection)
    close(masked, sparse_attention(q, keys, values, selection, queries, scale=0.3, version=version))


class Counted:
    """Records that count how many rows are read."""

    def __init__(self, records: Records) -> None:
        self.records, self.rows = records, 0

    def read(self, rows: Tensor | slice) -> Tensor:
        values = self.records.read(rows)
        self.rows += values.shape[0] * values.shape[1]
        return values


def test_torch_reads_latents_once() -> None:
    """fp8 rows being decoded a second time for the values that are part of them."""
    records = Counted(OneHead(Rows(torch.randn(20, 8))))
    keys = KeySource(records, Contexts.packed([20]))
    values = KeySource(Columns(records, 6), keys.contexts)
    selection = random_selection([20], [20], 5)
    sparse_attention(torch.randn(20, 2, 8), keys, values, selection, Queries((0, 20), (0,)), scale=1.0, version="torch")
    assert records.rows == selection.numel()


@pytest.mark.parametrize("version", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_selected(version: str, dtype: torch.dtype) -> None:
    """A query without any entry turning into NaN, or into a key that it did not select; NaN in its gradient."""
    q = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    k = torch.randn(9, 2, 6, dtype=dtype)
    keys, values = (KeySource(Rows(x), Contexts.packed([9])) for x in (k, k))
    selection = torch.tensor([[-1, -1], [3, -1]], dtype=torch.int32)
    result = sparse_attention(q, keys, values, selection, Queries((0, 2), (7,)), scale=1.0, version=version)
    assert (result[0] == 0).all()
    torch.testing.assert_close(result[1].detach(), k[3].repeat_interleave(2, 0))
    (gradient,) = torch.autograd.grad(result.float().sum(), q)
    assert gradient.isfinite().all()


def test_gradients_of_latents() -> None:
    """The values' share of a latent row's gradient being lost."""
    counts, lengths = [9, 30], [9, 30]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 5)
    q = torch.randn(39, 4, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(39, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(39, 4, 4, dtype=torch.float64)
    grads: dict[str, tuple[Tensor, ...]] = {}
    for version in ("reference", "torch"):
        keys = KeySource(OneHead(Rows(k)), Contexts.packed(lengths))
        values = KeySource(Columns(keys.records, 4), keys.contexts)
        out = sparse_attention(q, keys, values, selection, queries, scale=0.4, version=version)
        grads[version] = torch.autograd.grad((out * weight).sum(), (q, k))
    for result, expected in zip(grads["torch"], grads["reference"], strict=True):
        close(result, expected)


@pytest.mark.parametrize("version", ["reference", "torch"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 9, -1], "query 1 has position 9, but its sequence has 9 keys"),
        ([0, -2, -1], "query 1 has position -2, but its sequence has 9 keys"),
        ([0, -1, 4], "query 1 has position 4 after a -1"),
        ([], r"selection has shape \(2, 0\)"),
    ],
)
def test_bad_selections_are_refused(version: str, row: list[int], message: str) -> None:
    """Reading past a sequence, or leaving out what stands behind a -1."""
    keys = KeySource(Rows(torch.randn(9, 2, 6)), Contexts.packed([9]))
    selection = torch.tensor([[0, 1, 8][: len(row)], row], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        sparse_attention(torch.randn(2, 4, 6), keys, keys, selection, Queries((0, 2), (7,)), scale=1.0, version=version)
