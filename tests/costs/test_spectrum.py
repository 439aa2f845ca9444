"""Latent ranks from weights: known spectra, every stored dtype, and files that are not what they should be."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import make_oracle
from safetensors.torch import save_file

from foveal.config import read_config
from foveal.config.model import Fp8Blocks
from foveal.costs import apply_variant
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.costs.spectrum import LayerSpectrum, latent_spectrum
from foveal.costs.tensors import Tensors


def test_a_known_rank(tmp_path: Path) -> None:
    """Keys and values decomposed apart, or only one of them: together they span exactly five directions."""
    make_oracle("llama", tmp_path)
    tensors = _load(tmp_path)
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(64, 5, generator=generator)).Q.T
    for layer in range(3):
        for part, size in (("k", 32), ("v", 32)):
            mixed = torch.randn(size, 5, generator=generator) @ basis
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = mixed
    save_file(tensors, tmp_path / "model.safetensors")
    spectra = latent_spectrum(tmp_path, read_config(tmp_path))
    assert [spectrum.layer for spectrum in spectra] == [0, 1, 2]
    assert all(spectrum.numbers == 64 and 3 <= spectrum.rank(0.999) <= 5 for spectrum in spectra)
    assert all(spectrum.energy[5] < 1e-9 for spectrum in spectra)


def _load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_against_torch(tmp_path: Path) -> None:
    """Singular values instead of their squares, or in rising order."""
    make_oracle("mistral", tmp_path)
    stored = _load(tmp_path)
    weight = torch.cat([stored[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "kv"])
    squares = torch.linalg.svdvals(weight.double()) ** 2
    spectrum = latent_spectrum(tmp_path, read_config(tmp_path))[1]
    np.testing.assert_allclose(spectrum.energy, (squares / squares.sum()).numpy(), atol=1e-12)
    for share in (0.9, 0.95, 0.99, 0.999):
        rank = spectrum.rank(share)
        assert sum(spectrum.energy[:rank]) >= share - 1e-9 > sum(spectrum.energy[: rank - 1]) - 1e-9
        assert spectrum.saved(share) == 1 - (rank + spectrum.rope_key) / spectrum.numbers


def test_latent_attention_and_hybrids(tmp_path: Path) -> None:
    """The expansion of a latent being missed, or Jamba's other layers being looked for."""
    make_oracle("deepseek_v2", tmp_path / "a")
    spectra = latent_spectrum(tmp_path / "a", read_config(tmp_path / "a"))
    assert [(found.layer, found.numbers, found.rope_key, len(found.energy)) for found in spectra] == [
        (layer, 48, 8, 40) for layer in range(3)
    ]
    make_oracle("jamba", tmp_path / "b")
    assert [spectrum.layer for spectrum in latent_spectrum(tmp_path / "b", read_config(tmp_path / "b"))] == [2]


def test_what_is_saved_is_what_the_variant_saves(tmp_path: Path) -> None:
    """The loose account that this tool corrects elsewhere: the cached row is the latent and a rope key."""
    make_oracle("llama", tmp_path)
    config = read_config(tmp_path)
    spectrum = latent_spectrum(tmp_path, config)[0]
    latent = apply_variant(config, f"mla:{spectrum.rank(0.95)}")
    now, then = (cache_cost(model, cache_dtypes("float32")).bytes_per_token for model in (config, latent))
    assert spectrum.saved(0.95) == pytest.approx(1 - then / now)


def test_rank_at_the_edge() -> None:
    """An off-by-one in how many directions are kept."""
    spectrum = LayerSpectrum(0, 8, 1, (0.5, 0.4, 0.05, 0.04, 0.01))
    assert [spectrum.rank(share) for share in (0.5, 0.9, 0.901, 0.95, 0.99, 0.999)] == [1, 2, 3, 3, 4, 5]
    assert spectrum.saved(0.99) == 0.375
    assert spectrum.as_dict()["ranks"]["0.95"] == {"rank": 3, "cache_saved": 0.5}  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """bfloat16 read as another format: numpy has none."""
    stored = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"x": torch.zeros(3), "w": stored}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(Tensors(tmp_path, None).read("w"), stored.float().numpy())


def test_fp8_blocks(tmp_path: Path) -> None:
    """All 256 numbers of e4m3, and scales of blocks that are cut short."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = every.view(16, 16)[:, :15].contiguous()
    scales = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    read = Tensors(tmp_path, Fp8Blocks(8, 8)).read("w")
    spread = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)[:, :15]
    np.testing.assert_array_equal(read, (weight.float() * spread).numpy())
    with pytest.raises(ValueError, match=r"w_scale_inv \[2, 2\] does not fit"):
        Tensors(tmp_path, Fp8Blocks(4, 4)).read("w")


def test_refusals(tmp_path: Path) -> None:
    """A file that is not there, is no safetensors file, is cut short, or lacks the tensor."""
    with pytest.raises(ValueError, match=r"holds no \.safetensors files"):
        Tensors(tmp_path, None)
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(8, 8), "i": torch.zeros(2, dtype=torch.int32)}, file)
    with pytest.raises(ValueError, match="no tensor nothing"):
        Tensors(tmp_path, None).read("nothing")
    with pytest.raises(ValueError, match="stored as I32"):
        Tensors(tmp_path, None).read("i")
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match="cut short"):
        Tensors(tmp_path, None).read("w")
    for content in (b"", b"abc", whole[:30], struct.pack("<Q", 1 << 60), _header({"w": {"dtype": "F32"}})):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            Tensors(tmp_path, None)


def test_models_without_a_spectrum(tmp_path: Path) -> None:
    """Weights that say nothing being divided by zero."""
    make_oracle("llama", tmp_path)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in _load(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layer 0: the weights of keys and values are all zero"):
        latent_spectrum(tmp_path, read_config(tmp_path))
    make_oracle("llama", tmp_path / "odd")
    tensors = _load(tmp_path / "odd")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(ValueError, match="layer 1: the weights of keys and values are not all numbers"):
        latent_spectrum(tmp_path / "odd", read_config(tmp_path / "odd"))
    mamba = {"model_type": "mamba", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="mamba has no attention layers"):
        latent_spectrum(tmp_path, read_config(mamba))


def _header(entries: object) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw
