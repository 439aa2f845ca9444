"""The compiled gated activations against the reference in float64."""

import pytest
import torch
from compiled import each_isa

from foveal.kernels import gated
from foveal.kernels.cpu.activation import COMPILED

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", COMPILED)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 29), (2, 8192), (50, 200), (0, 8)])
def test_gated(isa: str, activation: str, dtype: torch.dtype, rows: int, size: int) -> None:
    """Halves mixed up, a tail that is left out, rows skipped between threads' shares."""
    x = (3 * torch.randn(rows, 2 * size)).to(dtype)
    result = gated(x, activation, version=isa)
    expected = gated(x.double(), activation, version="reference")
    assert result.dtype == dtype and result.shape == (rows, size)
    assert (result.double() - expected).abs().le(TOLERANCE[dtype] * (1 + expected.abs())).all()


@each_isa
@pytest.mark.parametrize("activation", COMPILED)
def test_extremes(isa: str, activation: str) -> None:
    """An exponential that overflows to NaN far from zero, and a NaN that gets lost."""
    x = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, torch.nan, *[1.0] * 6]])
    result = gated(x, activation, version=isa)
    expected = gated(x.double(), activation, version="reference")
    assert torch.allclose(result.double(), expected, atol=1e-6, equal_nan=True)


@each_isa
def test_gated_of_a_part_of_a_row(isa: str) -> None:
    """A stride that is not honoured."""
    wide = torch.randn(5, 40)
    assert torch.equal(
        gated(wide[:, 3:33], "silu", version=isa), gated(wide[:, 3:33].contiguous(), "silu", version=isa)
    )


@each_isa
def test_an_odd_width_is_refused(isa: str) -> None:
    """Gate and up that overlap."""
    with pytest.raises(ValueError, match="two halves"):
        gated(torch.randn(2, 7), "silu", version=isa)


@each_isa
def test_others_go_to_torch(isa: str) -> None:
    """An activation that is not compiled being taken for one that is."""
    x = torch.randn(3, 10)
    assert torch.equal(gated(x, "gelu"), gated(x, "gelu", version="torch"))
    with pytest.raises(ValueError, match="cannot take"):
        gated(x, "gelu", version=isa)
