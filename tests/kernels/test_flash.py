"""`flash_attention`: every version against plain autograd in float64, shapes of all kinds."""

from collections.abc import Iterator

import pytest
import torch
from compiled import ISAS
from torch import Tensor

from foveal.kernels import flash_attention

VERSIONS = ["reference", "torch", *ISAS]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
SHAPES = {  # batch, queries, keys, heads, kv heads, P, V
    "equal": (2, 5, 5, 4, 2, 8, 8),
    "more queries": (1, 70, 30, 6, 2, 16, 8),
    "one query": (3, 1, 90, 4, 4, 8, 8),
    "fewer queries": (2, 33, 200, 4, 1, 24, 16),
    "long": (1, 300, 300, 2, 2, 8, 8),
}
MASKS = [(False, None, 0), (True, None, 0), (True, 7, 0), (True, 7, 3)]


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, queries, keys, heads, groups, key_dim, value_dim = shape
    shapes = ((batch, queries, heads, key_dim), (batch, keys, groups, key_dim), (batch, keys, groups, value_dim))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, sinks: int) -> Tensor:
    """Attention as one would write it down; zeros where nothing is seen."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    position, key = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    seen = (key <= position) if causal else torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if window:
        seen &= (key > position - window) | (key < sinks)
    scores = torch.einsum("sthp,snhp->shtn", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen.any(1)[:, None]
    return torch.einsum("shtn,snhv->sthv", weights, v)


def errors(results: list[Tensor], expected: list[Tensor]) -> Iterator[float]:
    for result, right in zip(results, expected, strict=True):
        yield float((result.detach().double() - right.detach()).norm() / right.detach().norm())


@pytest.mark.parametrize(
    ("version", "dtype"),
    [
        (version, dtype)
        for version in VERSIONS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        if version not in ISAS or dtype != torch.float64
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(version: str, dtype: torch.dtype, shape: str) -> None:
    """A mask aligned to the wrong corner, a gradient that misses a head of a group or a tile, NaN where nothing is."""
    for causal, window, sinks in MASKS:
        inputs = tensors(SHAPES[shape], dtype)
        out = flash_attention(*inputs, causal=causal, window=window, sinks=sinks, version=version)
        direction = torch.randn_like(out)
        gradients = torch.autograd.grad(out, inputs, direction)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        expected = plain(*wide, causal, window, sinks)
        right = torch.autograd.grad(expected, wide, direction.double())
        assert out.dtype == dtype and all(x.dtype == dtype for x in gradients)
        assert max(errors([out, *gradients], [expected, *right])) < TOLERANCE[dtype]


def test_gradcheck() -> None:
    """A backward pass that is not the derivative of the forward pass."""
    inputs = tensors((2, 4, 6, 4, 2, 3, 2), torch.float64)
    for causal, window in ((False, None), (True, None), (True, 2)):
        assert torch.autograd.gradcheck(lambda *x, c=causal, w=window: flash_attention(*x, causal=c, window=w), inputs)


def test_backward_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are skipped, doubled or cut at the wrong place."""
    monkeypatch.setattr("foveal.kernels.flash.TILE_SCORES", 4 * 7 * 7)
    for causal, window, sinks in MASKS:
        inputs = tensors((1, 40, 50, 4, 2, 6, 5), torch.float64)
        out = flash_attention(*inputs, causal=causal, window=window, sinks=sinks)
        expected = plain(*inputs, causal, window, sinks)
        direction = torch.randn_like(out)
        results = [out, *torch.autograd.grad(out, inputs, direction)]
        right = [expected, *torch.autograd.grad(expected, inputs, direction)]
        assert max(errors(results, right)) < 1e-12


@pytest.mark.parametrize("version", VERSIONS)
def test_strides(version: str) -> None:
    """Rows taken for dense ones: heads first in memory, a part of a projection, a last stride that is not 1."""
    q, k, v = (x.detach() for x in tensors((2, 9, 12, 4, 2, 8, 8), torch.float32))
    expected = flash_attention(q, k, v, causal=True, version="reference")
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    dims_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    part = [torch.cat((x, x), 3)[..., 8:] for x in (q, k, v)]
    for inputs in (heads_first, dims_first, part):
        assert (flash_attention(*inputs, causal=True, version=version) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_empty(version: str) -> None:
    """A crash or NaN where there are no keys, no queries or no batch."""
    for batch, queries, keys in ((2, 3, 0), (2, 0, 3), (0, 2, 3)):
        q, k, v = (x.detach() for x in tensors((batch, queries, keys, 4, 2, 8, 8), torch.float32))
        for causal in (False, True):
            out = flash_attention(q, k, v, causal=causal, version=version)
            assert out.shape == q.shape and out.eq(0).all()


def test_scale() -> None:
    """A default scale that is not P ** -0.5, or a given one that is not used (a negative one falls to torch)."""
    q, k, v = (x.detach() for x in tensors((1, 4, 4, 2, 2, 16, 8), torch.float32))
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k, v, scale=0.25))
    close = flash_attention(q * 2, k, v, scale=0.125) - flash_attention(q, k, v)
    assert close.abs().max() < 1e-6
    assert (flash_attention(-q, k, v, scale=-0.25) - flash_attention(q, k, v)).abs().max() < 1e-5


def test_bad_arguments_are_refused() -> None:
    """Shapes that are broadcast or read past their end; options that would be ignored."""
    q, k, v = (x.detach() for x in tensors((2, 4, 6, 4, 2, 8, 8), torch.float32))
    bad = {
        "expected": (q[0], k, v),
        "batch sizes differ": (q[:1], k, v),
        "length or heads": (q, k, v[:, :5]),
        "differ in dim": (q[..., :7], k, v),
        "not a multiple": (q[:, :, :3], k, v),
        "one floating dtype": (q, k, v.bfloat16()),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            flash_attention(*arguments)
    with pytest.raises(ValueError, match="window=3, causal=False"):
        flash_attention(q, k, v, window=3)
    with pytest.raises(ValueError, match="window=0"):
        flash_attention(q, k, v, window=0, causal=True)
    with pytest.raises(ValueError, match="not -2"):
        flash_attention(q, k, v, sinks=-2)
