"""Eight-bit formats against a float64 transcription of DeepSeek's formulas."""

import math

import pytest
import torch
from torch import Tensor
from transcription import INDEX_VECTORS, act_quant, every_e4m3, hadamard_matrix

from foveal.cache.layouts import IndexKeyLayout, LatentLayout
from foveal.kernels import Contexts, KeySource, Queries, hadamard, quantise_e4m3, quantise_index, select
from foveal.kernels.quantise import e4m3_to_float32, power_of_two_scale, quantise_int8


def test_e4m3_decoding_is_exact() -> None:
    """Denormals, signs or the exponent bias going wrong in the bit trick. Codes 127 and 255 are NaN."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    expected = [value for code, value in enumerate(every_e4m3()) if code & 127 != 127]
    assert e4m3_to_float32(codes).tolist() == expected


@pytest.mark.parametrize("size", [1e-7, 1.0, 300.0, 1e4])
def test_quantise_e4m3(size: float) -> None:
    """The scale rounded down (overflow to NaN), the floor on amax lost, or a value rounded the wrong way."""
    x = torch.randn(20, 64) * size
    values, scales = quantise_e4m3(x, block=64)
    decoded = values.double() * scales
    for row in range(20):
        expected, scale = act_quant(x[row])
        assert scales[row].item() == scale
        assert torch.equal(decoded[row], expected)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1.0, 1e4])
def test_quantise_int8(size: float) -> None:
    """A value off by more than half a step, the largest not reaching 127, -128, or zeros divided by zero."""
    x = torch.randn(20, 64) * size
    values, scales = quantise_int8(x)
    assert torch.allclose(scales, x.abs().amax(-1).clamp_min(1e-4) / 127)
    assert (x - values * scales[:, None]).abs().le(scales[:, None] * 0.5001).all()
    assert (values.int().abs().amax(-1) == 127).all() == (size >= 1.0) and values.min() >= -127


def test_scale_at_exact_powers() -> None:
    """An amax of exactly 448 * 2^k getting the next power."""
    amax = torch.tensor([448.0, 449.0, 224.0, 1e-9])
    assert power_of_two_scale(amax).tolist() == [1.0, 2.0, 0.5, 2.0 ** math.ceil(math.log2(1e-4 / 448))]


def test_hadamard() -> None:
    """A transform that is not orthonormal, or not the Sylvester order."""
    x = torch.randn(5, 32, dtype=torch.float64)
    assert torch.allclose(hadamard(x), x @ hadamard_matrix(32))
    with pytest.raises(ValueError, match="power-of-two dimension, not 48"):
        hadamard(torch.randn(2, 48))


def paged(length: int) -> tuple[Tensor, Contexts]:
    """Rows of a shuffled sequence of pages, and the context that finds them."""
    pages = torch.randperm(-(-length // 64)) + 1
    rows = (pages[:, None] * 64 + torch.arange(64)).flatten()[:length]
    return rows, Contexts.paged(pages[None], [length])


@pytest.mark.parametrize("version", [name for name in select.versions if name != "triton"])
@pytest.mark.parametrize("stored", ["fp8", "int8"])
@pytest.mark.parametrize("consecutive", [True, False])
def test_selection_equals_the_transcription(
    consecutive: bool, stored: str, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any slip in hadamard -> rounding -> page layout -> scores -> selection; prints the overlap with unquantised."""
    heads, dim, length, count, topk = 16, 64, 300, 40, 32
    q, k, weights = torch.randn(count, heads, dim), torch.randn(length, dim), torch.randn(count, heads)
    layout = IndexKeyLayout(8, dim, stored, "cpu")
    rows, contexts = paged(length) if not consecutive else (torch.arange(64, 64 + length), Contexts((length,), (64,)))
    layout.write(rows, k)
    assert layout.pages.shape[1] == 64 * (dim + 4)
    queries = Queries((0, count), (length - count,))
    values, scale = quantise_index(q, stored)
    source = KeySource(layout.records, contexts)
    selected = select(values, weights * scale, source, queries, topk=topk, version=version)

    turned, keys = INDEX_VECTORS[stored](q), INDEX_VECTORS[stored](k)
    overlap = 0
    for t in range(count):
        seen = length - count + t + 1
        scores = weights[t].double() @ torch.relu(turned[t] @ keys[:seen].T)
        expected = scores.topk(topk)
        missed = set(selected[t].tolist()) ^ set(expected.indices.tolist())
        # float32 accumulation may swap neighbours at the threshold, nothing else.
        assert all(abs(scores[n] - expected.values[-1]) < 1e-4 * scores.abs().max() for n in missed)
        plain = weights[t] @ torch.relu(q[t] @ k[:seen].T)
        overlap += len(set(selected[t].tolist()) & set(plain.topk(topk).indices.tolist()))
    share = overlap / (count * topk)
    with capsys.disabled():
        print(f" [{stored} selection: {share:.1%} of the unquantised one]", end="")
    assert share > 0.9


def test_latent_record() -> None:
    """The fp8 latent record: its size for DeepSeek-V3, odd ranks, scales by 128, an untouched bfloat16 rope key."""
    assert LatentLayout(1, 512, 64, torch.bfloat16, "cpu").pages.shape[2] == 656
    layout = LatentLayout(4, 200, 8, torch.float32, "cpu")
    latent = torch.randn(100, 208) * 3
    rows, contexts = paged(100)
    layout.write(rows, latent)
    read = KeySource(layout.records, contexts).context(0, 0, 100)
    for row in (0, 63, 99):
        first, second = act_quant(latent[row, :128])[0], act_quant(latent[row, 128:200])[0]
        assert torch.equal(read[row, :200].double(), torch.cat((first, second)))
    assert torch.equal(read[:, 200:], latent[:, 200:].bfloat16().float())
