"""Compiled products with weights against float64: every instruction set and way of storing weights."""

import pytest
import torch
from compiled import ISAS, each_isa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.kernels import QuantisedWeight, linear, quantise_weight
from foveal.kernels.matmul import Weight

DTYPES = [torch.float32, torch.bfloat16]
# Relative to |x| |w|: sums in float32; activations in 16-bit fixed point for quantised weights; results in bfloat16.
EXACT, FIXED, ROUNDED = 1e-6, 2e-5, 2**-8
WEIGHTS = ["plain", "int8", "int4-32", "int4-64", "int4-128"]


def make_weight(kind: str, outputs: int, inputs: int, dtype: torch.dtype) -> Weight:
    weight = torch.randn(outputs, inputs).to(dtype)
    if kind == "plain":
        return weight
    quantization, _, group = kind.partition("-")
    return quantise_weight(weight, quantization, int(group or 32))


def wide(weight: Weight) -> Tensor:
    return weight.dequantise(torch.float64) if isinstance(weight, QuantisedWeight) else weight.double()


def check_product(result: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None, slack: float = 0.0) -> None:
    """Every number is near that of float64, by the size of the row and the column that it comes from (slack: so much
    more of that)."""
    expected = x.double() @ wide(weight).T
    bound = (slack + (FIXED if isinstance(weight, QuantisedWeight) else EXACT)) * x.double().norm(dim=1)[:, None]
    bound = bound * wide(weight).norm(dim=1)
    if bias is not None:
        expected += bias.double()
    if x.dtype == torch.bfloat16:
        bound = bound + ROUNDED * expected.abs()
    assert result.dtype == x.dtype and result.shape == expected.shape
    assert ((result.double() - expected).abs() <= bound + 1e-12).all()


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 8, 9, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 128), (7, 384), (65, 640)])
def test_linear(isa: str, dtype: torch.dtype, kind: str, rows: int, outputs: int, inputs: int) -> None:
    """Outputs or rows left over beside those computed together; scales, lows and biases of other rows."""
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    weight = make_weight(kind, outputs, inputs, dtype)
    check_product(linear(x, weight, bias, version=isa), x, weight, bias)
    check_product(linear(x, weight, version=isa), x, weight)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize("inputs", [1, 2, 7, 15, 31, 33, 100, 129, 161])
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_inputs_that_fill_no_register(isa: str, dtype: torch.dtype, kind: str, inputs: int, rows: int) -> None:
    """Numbers past the end of a row that count, or are read beyond the weight."""
    x, weight = torch.randn(rows, inputs).to(dtype), make_weight(kind, 5, inputs, dtype)
    check_product(linear(x, weight, version=isa), x, weight)


@each_isa
@pytest.mark.parametrize("kind", WEIGHTS)
def test_many_rows_and_long_ones(isa: str, kind: str) -> None:
    """Seams between blocks of inputs, outputs and rows that fit in cache."""
    x = torch.randn(300, 1152)
    weight = make_weight(kind, 150, 1152, torch.float32)
    check_product(linear(x, weight, version=isa), x, weight)


@each_isa
@pytest.mark.parametrize("rows", [5, 16, 31, 32, 33, 64, 65])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 1056), (3, 32), (130, 64)])
def test_rows_of_a_batch(isa: str, rows: int, outputs: int, inputs: int) -> None:
    """Tiles that weights or activations do not fill, on either side of a product; more rows than one has."""
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    check_product(linear(x, weight, bias, version=isa), x, weight, bias)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS[1:])
@pytest.mark.parametrize("rows", [5, 8, 9, 31, 127])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 128), (40, 2176), (530, 384)])
def test_quantised_rows_of_a_batch(
    isa: str, dtype: torch.dtype, kind: str, rows: int, outputs: int, inputs: int
) -> None:
    """Panels that rows do not fill, scales of another group or block, inputs and outputs that do not fit at once."""
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    weight = make_weight(kind, outputs, inputs, dtype)
    check_product(linear(x, weight, bias, version=isa), x, weight, bias)


@each_isa
@pytest.mark.parametrize("kind", ["int8", "int4-32", "int4-64"])
@pytest.mark.parametrize("units", [1, 3, 33])
def test_inputs_that_fill_no_block(isa: str, kind: str, units: int) -> None:
    """What follows a row that ends within a block, the next row's values and scales, counting as its own."""
    _, _, group = kind.partition("-")
    inputs = units * int(group or 67)
    x, weight = torch.randn(6, inputs), make_weight(kind, 21, inputs, torch.float32)
    check_product(linear(x, weight, version=isa), x, weight)


@each_isa
@pytest.mark.parametrize("rows", [9, 64, 300])
def test_wide_weights(isa: str, rows: int) -> None:
    """Activations of a panel that need more room than a block of inputs does."""
    x, weight = torch.randn(rows, 6176).bfloat16(), torch.randn(40, 6176).bfloat16()
    check_product(linear(x, weight, version=isa), x, weight)


@each_isa
@pytest.mark.parametrize("kind", ["plain", "int8", "int4-32", "int4-128"])
def test_rows_do_not_know_each_other(isa: str, kind: str) -> None:
    """A row that is summed in another order in a tile that is not full."""
    x, weight = torch.randn(96, 2048).bfloat16(), make_weight(kind, 1000, 2048, torch.bfloat16)
    assert torch.equal(linear(x[:79], weight, version=isa), linear(x, weight, version=isa)[:79])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [130, 800])
def test_whoever_multiplies_many_rows(kind: str, dtype: torch.dtype, rows: int) -> None:
    """torch in the compiled products' place, with a weight that it does not understand or a bias that it drops."""
    x, bias = torch.randn(rows, 256).to(dtype), torch.randn(48).to(dtype)
    weight = make_weight(kind, 48, 256, dtype)
    # With weights in bfloat16.
    by_torch = isinstance(weight, QuantisedWeight) and dtype == torch.bfloat16 and rows == 800
    check_product(linear(x, weight, bias), x, weight, bias, 2**-8 if by_torch else 0.0)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_special_versions_stay_special() -> None:
    """Products of many rows that are named as the usual ones, take gradients away, or hide what does not fit."""
    assert linear.chosen() == ISAS[-1]
    x, weight = torch.randn(130, 64, requires_grad=True), torch.randn(8, 64)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), pytest.raises(ValueError, match="takes 96 inputs"):
        linear(x, torch.randn(8, 96))


@each_isa
@pytest.mark.parametrize(("rows", "dtype"), [(5, torch.float32), (5, torch.bfloat16), (70, torch.bfloat16)])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_threads_change_nothing(isa: str, kind: str, rows: int, dtype: torch.dtype) -> None:
    """Sums whose order depends on who computes them."""
    x, weight = torch.randn(rows, 256).to(dtype), make_weight(kind, 1000, 256, dtype)
    alone = linear(x, weight, version=isa)
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x, weight, version=isa), alone)
    finally:
        torch.set_num_threads(1)


def test_no_inputs() -> None:
    """A division by the length of a row: the bias alone is left."""
    bias = torch.randn(3)
    assert torch.equal(linear(torch.randn(2, 0), torch.randn(3, 0), bias), bias.expand(2, 3))


@each_isa
@pytest.mark.parametrize("kind", WEIGHTS)
def test_part_of_a_row(isa: str, kind: str) -> None:
    """A stride that is not honoured: inputs are slices of wider projections."""
    wider, weight = torch.randn(3, 300), make_weight(kind, 6, 128, torch.float32)
    assert torch.equal(
        linear(wider[:, 70:198], weight, version=isa), linear(wider[:, 70:198].clone(), weight, version=isa)
    )


@each_isa
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, 11])
def test_what_is_not_finite_stays_so(isa: str, kind: str, value: float, rows: int) -> None:
    """A broken activation that integers turn into a plausible number, or that reaches other rows."""
    x, weight = torch.randn(rows, 256), make_weight(kind, 4, 256, torch.float32)
    x[1, 77] = value
    result = linear(x, weight, version=isa)
    assert not result[1].isfinite().any() and result[torch.arange(rows) != 1].isfinite().all()


@each_isa
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-25, 1e30])
@pytest.mark.parametrize("rows", [2, 6])
def test_extreme_activations(isa: str, kind: str, size: float, rows: int) -> None:
    """A scale that overflows or divides by zero."""
    x, weight = torch.randn(rows, 128) * size, make_weight(kind, 4, 128, torch.float32)
    check_product(linear(x, weight, version=isa), x, weight)


@each_isa
@pytest.mark.parametrize("kind", ["int8", "int4-32"])
@pytest.mark.parametrize("rows", [1, 6])
def test_an_outlier_hides_only_its_block(isa: str, kind: str, rows: int) -> None:
    """One scale for a whole row: an activation a thousand times larger than all others would drown them."""
    x, weight = torch.randn(1, 512).repeat(rows, 1), make_weight(kind, 8, 512, torch.float32)
    without = x.clone()
    x[:, 3] = 3000.0
    without[:, :128] = 0
    assert isinstance(weight, QuantisedWeight)
    outlier = torch.zeros(rows, 512)
    outlier[:, :128] = x[:, :128]
    rest = linear(x, weight, version=isa) - linear(outlier, weight, version=isa)
    assert (rest - without @ weight.dequantise(torch.float32).T).abs().max() < 2e-2


@each_isa
@given(
    rows=st.integers(0, 20),
    outputs=st.integers(1, 70),
    units=st.integers(1, 12),
    kind=st.sampled_from(["plain", "int8", "int4-32"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size(isa: str, rows: int, outputs: int, units: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    """Whatever combination of sizes the others left out."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 32 * units).to(dtype), make_weight(kind, outputs, 32 * units, dtype)
    check_product(linear(x, weight, version=isa), x, weight)


@each_isa
def test_what_does_not_fit_is_refused(isa: str) -> None:
    """Reading past the end of a weight or a bias."""
    x, weight = torch.randn(2, 64), torch.randn(5, 64)
    with pytest.raises(ValueError, match="takes 96 inputs"):
        linear(x, torch.randn(5, 96), version=isa)
    with pytest.raises(ValueError, match=r"bias has shape \[4\]"):
        linear(x, weight, torch.randn(4), version=isa)
    with pytest.raises(ValueError, match="cannot take these arguments"):
        linear(x.double(), weight.double(), version=isa)
    with pytest.raises(ValueError, match="not differentiable"):
        linear(x.requires_grad_(), weight, version=isa)
