"""The compiled rope against the reference in float64."""

import pytest
import torch
from compiled import each_isa
from torch import Tensor

from foveal.kernels import apply_rope

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def make_turns(tokens: int, pairs: int) -> Tensor:
    """Angles of any size; an absolute value other than 1, as yarn has."""
    return torch.polar(torch.full((tokens, pairs), 1.3), 100 * torch.randn(tokens, pairs))


@each_isa
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "pairs"), [(1, 12, 64, 32), (5, 3, 20, 7), (3, 1, 2, 1), (40, 9, 130, 65), (0, 2, 4, 2)]
)
def test_rope(isa: str, dtype: torch.dtype, interleaved: bool, tokens: int, heads: int, size: int, pairs: int) -> None:
    """Partners mixed up, a tail of pairs left out, dimensions beyond the turned ones that change or are lost."""
    x, turns = torch.randn(tokens, heads, size).to(dtype), make_turns(tokens, pairs)
    result = apply_rope(x, turns, interleaved=interleaved, version=isa)
    expected = apply_rope(x.double(), turns, interleaved=interleaved, version="reference")
    assert result.dtype == dtype and result.shape == x.shape
    assert (result.double() - expected).abs().le(TOLERANCE[dtype] * (1 + expected.abs())).all()
    assert torch.equal(result[..., 2 * pairs :], x[..., 2 * pairs :])


@each_isa
def test_rope_of_a_part_of_a_projection(isa: str) -> None:
    """A stride that is not honoured: heads are slices of a wider row."""
    wide, turns = torch.randn(6, 5, 24), make_turns(6, 4)
    part = wide[:, 1:4, 8:20]
    assert torch.equal(
        apply_rope(part, turns, interleaved=True, version=isa),
        apply_rope(part.contiguous(), turns, interleaved=True, version=isa),
    )


@each_isa
@pytest.mark.parametrize(("tokens", "pairs"), [(2, 4), (3, 5)])
def test_mismatched_turns_are_refused(isa: str, tokens: int, pairs: int) -> None:
    """Reading past the end of the turns, or turning past the end of a head."""
    with pytest.raises(ValueError, match="turns are"):
        apply_rope(torch.randn(3, 2, 8), make_turns(tokens, pairs), interleaved=False, version=isa)


def test_torch_and_reference_agree() -> None:
    """The two definitions drifting apart: the complex product and the plain one, gradients included."""
    turns = make_turns(4, 3)
    for interleaved in (False, True):
        x = torch.randn(4, 2, 9, requires_grad=True)
        results = [apply_rope(x, turns, interleaved=interleaved, version=name) for name in ("torch", "reference")]
        grads = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
        assert torch.allclose(*results, atol=1e-6) and torch.allclose(*grads, atol=1e-5)
