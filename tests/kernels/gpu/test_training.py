"""The Triton kernels for training, interpreted: gradients against those of the references."""

import pytest
import torch
from packing import make_queries, random_selection

from foveal.kernels import Contexts, KeySource, Rows, index_divergence, sparse_attention
from foveal.kernels.gpu.launch import Choice, Launch, Tiles
from foveal.kernels.gpu.places import places
from foveal.kernels.gpu.sparse_backward import sparse_backward
from foveal.kernels.gpu.sparse_divergence import selected_divergence
from foveal.kernels.gpu.warmup import Gaze, warmup_divergence
from foveal.kernels.packed import packed_rows


@pytest.mark.parametrize(("heads", "groups", "width", "value_width"), [(6, 2, 12, 5), (18, 1, 40, 33)])
def test_sparse_backward(heads: int, groups: int, width: int, value_width: int) -> None:
    """A part of the keys' numbers left out, rows that several queries select, another group's heads; a query that
    selects nothing."""
    torch.manual_seed(0)
    counts, lengths = [2, 3], [9, 30]
    q = torch.randn(5, heads, width, requires_grad=True)
    k, v = (torch.randn(39, groups, size, requires_grad=True) for size in (width, value_width))
    contexts, queries = Contexts.packed(lengths), make_queries(counts, lengths)
    keys, values = KeySource(Rows(k), contexts), KeySource(Rows(v), contexts)
    selection = random_selection(counts, lengths, 20)
    selection[1] = -1
    out = sparse_attention(q, keys, values, selection, queries, scale=0.3, version="torch")
    d_out = torch.randn_like(out)
    out.backward(d_out)
    rows, choice = packed_rows(selection, keys, queries), Choice(Tiles(16, 16, 4, 1))
    learned = (x.detach() for x in (q, k, v, out))
    launch, *gradients = sparse_backward(*learned, d_out, rows, scale=0.3, choice=choice)
    launch.run()
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        torch.testing.assert_close(gradient, x.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_sparse_attention_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward or a backward pass of grouped heads that is left to torch, or one that does not fit the other."""
    launched = []
    start = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (launched.append(launch.kernel.fn.__name__), start(launch)))
    counts = [4, 7]
    contexts, queries = Contexts.packed(counts), make_queries(counts, counts)
    selection, d_out = random_selection(counts, counts, 5), torch.randn(11, 4, 5)
    learned = [torch.randn(11, heads, size) for heads, size in ((4, 6), (2, 6), (2, 5))]
    found = []
    for version in ({}, {"version": "reference"}):
        q, k, v = inputs = [x.clone().requires_grad_() for x in learned]
        keys, values = KeySource(Rows(k), contexts), KeySource(Rows(v), contexts)
        out = sparse_attention(q, keys, values, selection, queries, scale=0.3, **version)
        out.backward(d_out)
        found.append([out.detach(), *(x.grad for x in inputs)])
    assert launched == ["flash_kernel", "backward_kernel"]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "width", "index_heads", "size"), [(2, 1, 70, 3, 10), (4, 2, 8, 1, 16)])
def test_warmup(heads: int, groups: int, width: int, index_heads: int, size: int) -> None:
    """A sum over keys that misses a block, a tile or a head; the future or another sequence seen; an empty sequence;
    token weights left out; gradients that do not add up over blocks of keys."""
    torch.manual_seed(1)
    lengths = [19, 0, 5]
    tokens, contexts, queries = 24, Contexts.packed(lengths), make_queries(lengths, lengths)
    q_index, weights, k_index = (
        torch.randn(tokens, *shape, requires_grad=True) for shape in ((index_heads, size), (index_heads,), (size,))
    )
    q, k, token_weights = torch.randn(tokens, heads, width), torch.randn(tokens, groups, width), torch.rand(tokens)
    looking = (KeySource(Rows(k_index), contexts), q, KeySource(Rows(k), contexts), queries, token_weights)
    loss, each = index_divergence(q_index, weights, *looking, scale=0.3, version="reference")
    loss.backward()
    where, gaze = places(queries, contexts, tokens, q.device), Gaze(q, k, 0.3)
    learned = (q_index, weights, k_index)
    detached = [x.detach() for x in learned]
    result = warmup_divergence(*detached, gaze, token_weights, where, 19).run()
    torch.testing.assert_close(result.divergence_T, each, atol=2e-5, rtol=1e-5)
    for gradient, x in zip((result.d_q_TIJ, result.d_weights_TI, result.d_k_RJ), learned, strict=True):
        torch.testing.assert_close(gradient, x.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "width", "index_heads", "size"), [(2, 1, 70, 3, 10), (34, 2, 8, 1, 16)])
def test_a_selection(heads: int, groups: int, width: int, index_heads: int, size: int) -> None:
    """Keys that were not selected, or another sequence's; a block, a tile or a head that is left out; a query that
    selects nothing; a token of weight 0 that is looked at; rows that several queries select."""
    counts, lengths = [20, 0, 5], [20, 3, 5]
    contexts, queries = Contexts.packed(lengths), make_queries(counts, lengths)
    learned = q_index, weights, k_index = [
        torch.randn(count, *shape, requires_grad=True)
        for count, shape in ((25, (index_heads, size)), (25, (index_heads,)), (28, (size,)))
    ]
    q, k, token_weights = torch.randn(25, heads, width), torch.randn(28, groups, width), torch.rand(25)
    selection = random_selection(counts, lengths, 19)
    selection[3], token_weights[6] = -1, 0
    looking = (KeySource(Rows(k_index), contexts), q, KeySource(Rows(k), contexts), queries, token_weights)
    loss, each = index_divergence(q_index, weights, *looking, scale=0.3, selection_TK=selection, version="reference")
    loss.backward()
    rows, choice = packed_rows(selection, looking[2], queries), Choice(Tiles(16, 16, 4, 1))
    detached = [x.detach() for x in learned]
    result = selected_divergence(*detached, Gaze(q, k, 0.3), token_weights, rows, choice=choice).run()
    torch.testing.assert_close(result.divergence_T, each, atol=2e-5, rtol=1e-5)
    for gradient, x in zip((result.d_q_TIJ, result.d_weights_TI, result.d_k_RJ), learned, strict=True):
        torch.testing.assert_close(gradient, x.grad, atol=2e-5, rtol=1e-5)


def test_a_small_weight_in_half_precision() -> None:
    """Gradients that become 0 in float16 because they are multiplied by a token's share of a large batch too early."""
    q, weights, k = torch.randn(3, 2, 16).half(), torch.randn(3, 2), torch.randn(40, 16).half()
    gaze = Gaze(torch.randn(3, 4, 16).half(), torch.randn(40, 2, 16).half(), 0.3)
    rows, choice = torch.arange(40).repeat(3, 1), Choice(Tiles(16, 16, 4, 1))
    whole, small = (
        selected_divergence(q, weights, k, gaze, torch.full((3,), weight), rows, choice=choice).run()
        for weight in (1.0, 1e-6)
    )
    torch.testing.assert_close(small.d_q_TIJ * 1e6, whole.d_q_TIJ, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(small.d_k_RJ * 1e6, whole.d_k_RJ, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("topk", [None, 3])
def test_the_loss_is_differentiable(topk: int | None) -> None:
    """A loss or gradients that are not scaled by what follows."""
    contexts, queries = Contexts.packed([5]), make_queries([5], [5])
    learned = [torch.randn(5, 2, 4), torch.randn(5, 2), torch.randn(5, 4)]
    q, k, token_weights = torch.randn(5, 2, 6), torch.randn(5, 1, 6), torch.ones(5)
    selection = None if topk is None else random_selection([5], [5], topk)
    found = []
    for version in ("triton", "tiled"):
        q_index, weights, k_index = inputs = [x.clone().requires_grad_() for x in learned]
        sources = KeySource(Rows(k_index), contexts), q, KeySource(Rows(k), contexts)
        loss, _ = index_divergence(
            q_index, weights, *sources, queries, token_weights, scale=0.3, selection_TK=selection, version=version
        )
        (3 * loss).backward()
        found.append([loss.detach(), *(x.grad for x in inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
