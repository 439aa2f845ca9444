"""Training attention: results and gradients against the references' in float64, and memory that stays linear."""

import pytest
import torch
from packing import CASES, make_queries, random_selection
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows, attention, packed, sparse_attention


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def grouped(k: Tensor, v: Tensor, lengths: list[int]) -> tuple[KeySource, KeySource]:
    contexts = Contexts.packed(lengths)
    return KeySource(Rows(k), contexts), KeySource(Rows(v), contexts)


def same_gradients(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    upstream = torch.randn_like(one)
    for mine, theirs in zip(
        torch.autograd.grad(one, inputs, upstream), torch.autograd.grad(other, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (6, 9)])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("case", ["prefill", "chunk"])
def test_dense(case: str, window: int | None, widths: tuple[int, int]) -> None:
    """Values of another width than keys, a window, and sequences with keys before their first query."""
    counts, lengths = CASES[case]
    queries = make_queries(counts, lengths)
    q, k, v = leaves((sum(counts), 6, widths[0]), (sum(lengths), 2, widths[0]), (sum(lengths), 2, widths[1]))
    outs = [
        attention(q, *grouped(k, v, lengths), queries, scale=0.3, window=window, version=version)
        for version in ("recomputed", "reference")
    ]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-11)
    same_gradients(*outs, [q, k, v])


@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (300, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_gpus_want_it(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    """A head that reads another group's keys, or padding that is not left out again."""
    q, k, v = (torch.randn(9, *shape, dtype=dtype) for shape in ((6, widths[0]), (2, widths[0]), (2, widths[1])))
    outs = []
    for gpu in (False, True):
        parts = [x.transpose(0, 1)[None] for x in packed._as_fused(q, k, v, gpu=gpu)]
        out = scaled_dot_product_attention(*parts, is_causal=True, scale=0.3, enable_gqa=parts[1].shape[1] == 2)
        outs.append(out[..., : widths[1]].float())
    assert parts[0].shape[-1] % 8 == 0
    assert parts[1].shape[1] == (2 if dtype == torch.bfloat16 and widths[0] < 256 else 6)
    torch.testing.assert_close(*outs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", CASES)
def test_sparse_grouped(case: str) -> None:
    """A missing entry (-1) that takes part, or a row's gradient that goes to another sequence's row."""
    counts, lengths = CASES[case]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 6)
    q, k, v = leaves((sum(counts), 6, 8), (sum(lengths), 2, 8), (sum(lengths), 2, 5))
    outs = [
        sparse_attention(q, *grouped(k, v, lengths), selection, queries, scale=0.3, version=version)
        for version in ("recomputed", "reference")
    ]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-11)
    same_gradients(*outs, [q, k, v])


@pytest.mark.parametrize("case", CASES)
def test_sparse_latent(case: str) -> None:
    """A latent row is key and value at once: both gradients must arrive."""
    counts, lengths = CASES[case]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 6)
    q, rows = leaves((sum(counts), 4, 12), (sum(lengths), 12))
    keys = KeySource(OneHead(Rows(rows)), Contexts.packed(lengths))
    values = KeySource(Columns(keys.records, 9), keys.contexts)
    outs = [
        sparse_attention(q, keys, values, selection, queries, scale=0.3, version=version)
        for version in ("recomputed", "reference")
    ]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-11)
    same_gradients(*outs, [q, rows])


def test_finite_differences() -> None:
    """A gradient that agrees with a reference's only because both are wrong."""
    queries, selection = Queries((0, 5), (2,)), random_selection([5], [7], 3)
    q, k, v = leaves((5, 4, 3), (7, 2, 3), (7, 2, 2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, *grouped(k, v, [7]), selection, queries, scale=0.3)

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_some_sequences() -> None:
    """Rows of the other sequences: a batch's short ones take another form, so the long ones come alone, and their rows
    do not begin at 0. Two parts of one sequence may also share their rows."""
    lengths, starts = [5, 30, 18], [5, 20, 20]
    contexts = Contexts(tuple(lengths), tuple(starts))
    counts = [3, 4, 2]
    queries, selection = make_queries(counts, lengths), random_selection(counts, lengths, 4)
    q, k, v = leaves((sum(counts), 6, 8), (64, 2, 8), (64, 2, 5))
    keys, values = KeySource(Rows(k), contexts), KeySource(Rows(v), contexts)
    outs = [
        sparse_attention(q, keys, values, selection, queries, scale=0.3, version=version)
        for version in ("recomputed", "reference")
    ]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-11)
    same_gradients(*outs, [q, k, v])


def test_nothing_selected() -> None:
    """A query without any entry giving NaN, forward or backward."""
    q, k, v = leaves((2, 2, 3), (2, 1, 3), (2, 1, 3))
    selection = torch.tensor([[-1, -1], [0, 1]], dtype=torch.int32)
    out = sparse_attention(q, *grouped(k, v, [2]), selection, Queries((0, 2), (0,)), scale=1.0)
    gradients = torch.autograd.grad(out.sum(), [q, k, v])
    assert out[0].eq(0).all() and gradients[0][0].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_chosen_with_gradients() -> None:
    """Training that takes a version which keeps all weights, or one without gradients: only keys learn here."""
    counts = [40]
    q, k = torch.randn(40, 2, 8), torch.randn(40, 2, 8, requires_grad=True)
    out = attention(q, *grouped(k, k, counts), Queries((0, 40), (0,)), scale=0.3)
    assert out.requires_grad and "Scaled" in kinds(out.grad_fn)
    selection = random_selection(counts, counts, 4)
    out = sparse_attention(q, *grouped(k, k, counts), selection, Queries((0, 40), (0,)), scale=0.3)
    assert "_SparseAttention" in kinds(out.grad_fn)


def kinds(node: object, depth: int = 12) -> str:
    """The names of the operations behind a result."""
    if node is None or depth == 0:
        return ""
    below = getattr(node, "next_functions", ())
    return type(node).__name__ + " ".join(kinds(other, depth - 1) for other, _ in below)
