"""Quantised weights: what rounding keeps, and what is refused."""

from dataclasses import replace

import pytest
import torch

from foveal.kernels import linear, quantise_weight


@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 96)])
def test_int8_rounds_to_the_nearest(shape: tuple[int, ...]) -> None:
    """A scale from the wrong row or expert, truncation, or a clipped largest weight."""
    weight = torch.randn(shape)
    quantised = quantise_weight(weight, "int8")
    assert quantised.shape == shape and quantised.values.dtype == torch.int8
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((quantised.dequantise(torch.float64) - weight).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 384)])
def test_int4_rounds_to_the_nearest(shape: tuple[int, ...], group: int) -> None:
    """Nibbles in the wrong place, or the scale of a neighbouring group; a group far from zero."""
    weight = torch.randn(shape) + torch.linspace(-3, 3, shape[-1])
    quantised = quantise_weight(weight, "int4", group)
    assert quantised.shape == shape and quantised.group == group
    assert quantised.values.shape == (*shape[:-1], shape[-1] // 2)
    grouped = weight.unflatten(-1, (-1, group))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    # Half a step, and what bfloat16 rounds off the lowest weight and the step, which may clip the largest.
    bound = 0.51 * (high - low) / 15 + 2**-8 * (low.abs() + high - low)
    assert ((quantised.dequantise(torch.float64).unflatten(-1, (-1, group)) - grouped).abs() <= bound).all()
    exact = quantise_weight(quantised.dequantise(torch.float32), "int4", group)
    assert (exact.dequantise(torch.float32) - quantised.dequantise(torch.float32)).abs().max() < bound.max() / 4


def test_constant_and_zero_weights() -> None:
    """A division by a step of zero."""
    weight = torch.cat((torch.zeros(1, 32), torch.full((1, 32), 0.5), torch.full((1, 32), -2.0)))
    for quantization in ("int8", "int4"):
        assert torch.allclose(quantise_weight(weight, quantization).dequantise(torch.float32), weight)


def test_what_cannot_be_quantised() -> None:
    """An error that does not tell what is wrong, or weights that silently become zeros."""
    with pytest.raises(ValueError, match="int8, int4, not 'int3'"):
        quantise_weight(torch.randn(2, 64), "int3")
    with pytest.raises(ValueError, match="32, 64, 128 inputs, not 16"):
        quantise_weight(torch.randn(2, 64), "int4", 16)
    for inputs, group in ((48, 32), (96, 64), (192, 128)):
        with pytest.raises(ValueError, match=f"groups of {group} needs inputs that {group} divides, not {inputs}"):
            quantise_weight(torch.randn(2, inputs), "int4", group)
    for value in (float("nan"), float("inf")):
        for quantization in ("int8", "int4"):
            with pytest.raises(ValueError, match="infinities or NaN"):
                quantise_weight(torch.full((2, 32), value), quantization)


def test_parts_that_do_not_fit_together() -> None:
    """A kernel that reads past the end of scales, or takes 8 bits for two times 4."""
    weight = torch.randn(5, 64)
    int8, int4 = quantise_weight(weight, "int8"), quantise_weight(weight, "int4")
    assert int4.lows is not None
    for whole, wrong in (
        (int8, {"scales": int8.scales[:4]}),
        (int8, {"scales": int8.scales.bfloat16()}),
        (int8, {"values": torch.ones(5, 128, dtype=torch.int8)[:, :64]}),
        (
            int4,
            {"scales": int4.scales[:, :1].contiguous(), "lows": int4.lows[:, :1].contiguous()}
            | {"values": int4.values[:4]},
        ),
        (int4, {"scales": torch.ones(5, 4).bfloat16(), "lows": torch.ones(5, 4).bfloat16()}),
        (int4, {"lows": int4.lows[:4]}),
        (int4, {"lows": int4.lows.float()}),
        (int4, {"values": int4.values.view(torch.int8)}),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            replace(whole, **wrong)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_linear_with_a_quantised_weight(quantization: str) -> None:
    """The torch version, for dtypes and devices without a compiled one, with gradients for the input."""
    x, bias = torch.randn(3, 64, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    weight = quantise_weight(torch.randn(5, 64), quantization)
    expected = x @ weight.dequantise(torch.float64).T + bias
    assert torch.allclose(linear(x, weight, bias), expected)
    assert torch.allclose(linear(x, weight, bias, version="reference"), expected)
    assert linear(x, weight).requires_grad
