"""The compiled RMS norm against the reference in float64."""

import pytest
import torch
from compiled import each_isa

from foveal.kernels import add_rms_norm, rms_norm

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (2, 64), (40, 129), (0, 8)])
def test_rms_norm(isa: str, dtype: torch.dtype, rows: int, size: int) -> None:
    """Lanes past the end of a row that count, rows that are left out, a scale from the wrong row."""
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype)
    result = rms_norm(x, weight, 1e-5, version=isa)
    expected = rms_norm(x.double(), weight.double(), 1e-5, version="reference")
    assert result.dtype == dtype and result.shape == x.shape
    assert (result.double() - expected).abs().le(TOLERANCE[dtype] * (1 + expected.abs())).all()


@each_isa
def test_rms_norm_of_a_part_of_a_row(isa: str) -> None:
    """A stride that is not honoured: the latent is a slice of a wider projection."""
    wide, weight = torch.randn(5, 20), torch.randn(12)
    assert torch.equal(
        rms_norm(wide[:, 4:16], weight, 1e-5, version=isa),
        rms_norm(wide[:, 4:16].contiguous(), weight, 1e-5, version=isa),
    )


@each_isa
def test_rms_norm_of_heads(isa: str) -> None:
    """Heads that are read one after another though they are slices of a wider row; rows that are not contiguous."""
    wide, weight = torch.randn(5, 4, 12), torch.randn(12)
    for part in (wide[:, 1:3], wide[..., ::2]):
        size = part.shape[-1]
        expected = rms_norm(part.double(), weight[:size].double(), 1e-5, version="reference")
        result = rms_norm(part, weight[:size], 1e-5, version=isa)
        assert torch.allclose(result.double(), expected, atol=1e-5)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm(isa: str, dtype: torch.dtype) -> None:
    """A sum that is normed before it is rounded, or a residual of the wrong row."""
    x, residual, weight = torch.randn(17, 33).to(dtype), torch.randn(17, 33).to(dtype), torch.randn(33).to(dtype)
    total, normed = add_rms_norm(x, residual, weight, 1e-5, version=isa)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5, version=isa))


@each_isa
def test_mismatched_weight_is_refused(isa: str) -> None:
    """Reading past the end of a weight that is too short."""
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(torch.randn(2, 8), torch.randn(7), 1e-5, version=isa)
