"""The compiled rounding to eight bits: the same bits as in torch."""

import pytest
import torch
from compiled import each_isa
from torch import Tensor

from foveal.config.formats import PAGE_SIZE, latent_bytes
from foveal.kernels import quantise_index, write_index_keys, write_latents

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_kind = pytest.mark.parametrize("stored", ["fp8", "int8"])


def of_every_size(*shape: int) -> Tensor:
    """Rows of very different sizes, one of zeros, and one that a scale of exactly a power of two fits."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-8, 9, (*shape[:-1], 1))
    x.view(-1, shape[-1])[0] = 0
    x.view(-1, shape[-1])[-1] = 448.0
    return x


@each_isa
@each_kind
@each_dtype
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024])
def test_quantise_index(isa: str, stored: str, dtype: torch.dtype, size: int) -> None:
    """A sum in another order, a scale or a value rounded the other way, a row left out."""
    x = of_every_size(37, 3, size).to(dtype)
    values, scales = quantise_index(x, stored, version=isa)
    expected, expected_scales = quantise_index(x, stored, version="reference")
    assert values.dtype == expected.dtype and torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@each_isa
def test_every_rounding_to_e4m3(isa: str) -> None:
    """A tie between two e4m3 values, a denormal or the largest value rounded wrongly. 448 in front of them keeps the
    scale at one."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat((codes, between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(500.0))))
    wide = torch.zeros(len(numbers), 128 + 1)
    wide[:, 0], wide[:, 1], wide[:, 2] = 448.0, numbers, -numbers
    stored = {}
    for version in (isa, "reference"):
        stored[version] = torch.zeros(len(numbers), latent_bytes(128, 1, "fp8"), dtype=torch.uint8)
        write_latents(wide, torch.arange(len(numbers)), stored[version], 128, version=version)
    assert torch.equal(stored[isa], stored["reference"])
    assert (stored[isa][: len(codes), 1] == torch.arange(127)).all()


@each_isa
@each_kind
@each_dtype
def test_write_index_keys(isa: str, stored: str, dtype: torch.dtype) -> None:
    """A key or a scale in another place of its page, or bytes written that belong to other rows."""
    wide = of_every_size(100, 40).to(dtype)
    keys, rows = wide[:, 3:35], torch.randperm(5 * PAGE_SIZE)[:100]
    before = torch.randint(0, 256, (5, PAGE_SIZE * 36), dtype=torch.uint8)
    result, expected = before.clone(), before.clone()
    write_index_keys(keys, rows, result, stored, version=isa)
    write_index_keys(keys, rows, expected, stored, version="reference")
    assert torch.equal(result, expected) and not torch.equal(result, before)


@each_isa
@each_dtype
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (200, 8), (1, 1), (131, 7), (16, 0), (0, 4)])
def test_write_latents(isa: str, dtype: torch.dtype, rank: int, rope: int) -> None:
    """Blocks of 128 that share a wrong scale, the last shorter one, a misplaced rope key, other rows' bytes."""
    latents, rows = of_every_size(50, rank + rope + 2).to(dtype)[:, 1:-1], torch.randperm(90)[:50]
    before = torch.randint(0, 256, (90, latent_bytes(rank, rope, "fp8")), dtype=torch.uint8)
    result, expected = before.clone(), before.clone()
    write_latents(latents, rows, result, rank, version=isa)
    write_latents(latents, rows, expected, rank, version="reference")
    assert torch.equal(result, expected) and not torch.equal(result, before)


@each_isa
def test_refusals(isa: str) -> None:
    """A row that does not exist being written, or memory of the wrong size."""
    keys, pages = torch.randn(2, 32), torch.zeros(3, PAGE_SIZE * 36, dtype=torch.uint8)
    for row in (-1, 3 * PAGE_SIZE):
        with pytest.raises(ValueError, match=f"row {row} is not one of the cache's 192"):
            write_index_keys(keys, torch.tensor([0, row]), pages, "fp8", version=isa)
    with pytest.raises(ValueError, match="2 values, but rows are"):
        write_index_keys(keys, torch.tensor([0]), pages, "fp8", version=isa)
    with pytest.raises(ValueError, match="do not fit"):
        write_index_keys(keys[:, :16], torch.tensor([0, 1]), pages, "fp8", version=isa)
    with pytest.raises(ValueError, match="a power of two, not 48"):
        quantise_index(torch.randn(2, 48), "int8", version=isa)
    records = torch.zeros(5, latent_bytes(8, 2, "fp8"), dtype=torch.uint8)
    with pytest.raises(ValueError, match="row 5 is not one of the cache's 5"):
        write_latents(torch.randn(1, 10), torch.tensor([5]), records, 8, version=isa)
    with pytest.raises(ValueError, match="rank 11"):
        write_latents(torch.randn(1, 10), torch.tensor([0]), records, 11, version=isa)
    assert not pages.any() and not records.any()
