"""The Triton kernels that round to eight bits, interpreted: bit for bit what torch gives."""

import pytest
import torch

from foveal.config.formats import latent_bytes
from foveal.kernels import quantise_index, write_index_keys, write_latents
from foveal.kernels.gpu.rounding import round_index, store_index_keys, store_latents


def numbers(*shape: int) -> torch.Tensor:
    """Random numbers whose rows span thirteen orders of magnitude, one of them all zeros."""
    rows = torch.randn(*shape) * torch.logspace(-6, 6, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    rows[shape[0] // 2] = 0
    return rows


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_index_vectors(size: int, dtype: str) -> None:
    """The order of a turn's sums, ties of rounding, denormals, scales at powers of two; a block of rows that is not
    full."""
    torch.manual_seed(0)
    x = numbers(13, 1, size)
    launch, values, scales = round_index(x, dtype)
    launch.run()
    expected, expected_scales = quantise_index(x, dtype, version="reference")
    assert values.dtype == expected.dtype and torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


def test_every_number_near_a_tie() -> None:
    """Rounding to e4m3 that is wrong for some exponent: every code, the middle between neighbours, and next to it."""
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    nearby = torch.cat((codes, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(999.0))))
    both = torch.cat((nearby, -nearby))
    # Rows of one block each, whose first number is 448, so that the scale is 1.
    rows = torch.nn.functional.pad(both, (0, -len(both) % 127)).view(-1, 127)
    rows = torch.nn.functional.pad(rows, (1, 0), value=448.0)
    stored, expected = (torch.zeros(len(rows), latent_bytes(128, 0, "fp8"), dtype=torch.uint8) for _ in range(2))
    store_latents(rows, torch.arange(len(rows)), stored, 128).run()
    write_latents(rows, torch.arange(len(rows)), expected, 128, version="reference")
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_index_keys_into_pages(given: torch.dtype, dtype: str) -> None:
    """The wrong place in a page, a scale over another's; a row that is not there."""
    torch.manual_seed(1)
    keys, rows = numbers(9, 16).to(given), torch.randperm(190)[:9]
    pages, expected = (torch.full((3, 64 * 20), 7, dtype=torch.uint8) for _ in range(2))
    write_index_keys(keys[:8], rows[:8], expected, dtype, version="reference")
    rows[8] = 192
    store_index_keys(keys, rows, pages, dtype).run()
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (24, 8), (160, 6), (132, 0)])
def test_latents(rank: int, rope: int, given: torch.dtype) -> None:
    """A scale of the wrong block, the last block padded, rope keys cut off, not rounded; a row that is not there."""
    torch.manual_seed(2)
    latents, rows = numbers(6, rank + rope).to(given), torch.randperm(20)[:6]
    stored, expected = (torch.full((20, latent_bytes(rank, rope, "fp8")), 7, dtype=torch.uint8) for _ in range(2))
    write_latents(latents[:5], rows[:5], expected, rank, version="reference")
    rows[5] = -1
    store_latents(latents, rows, stored, rank).run()
    assert torch.equal(stored, expected)


def test_bad_arguments_are_refused() -> None:
    """Memory of another size being written all the same."""
    with pytest.raises(ValueError, match="power of two"):
        round_index(torch.zeros(1, 12), "fp8")
    with pytest.raises(ValueError, match="records of 16 bytes"):
        store_latents(torch.zeros(2, 10), torch.zeros(2, dtype=torch.int64), torch.zeros(4, 21, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="2 values, but rows"):
        pages = torch.zeros(1, 64 * 20, dtype=torch.uint8)
        store_index_keys(torch.zeros(2, 16), torch.zeros(3, dtype=torch.int64), pages, "fp8")
