"""GGUF files, written here with the `gguf` package, against the Hugging Face weights that they were made from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor

from foveal.config import read_config
from foveal.config.model import GQAConfig
from foveal.models.gguf import open_gguf, read_gguf, unpermute
from foveal.models.load import load_model

from ..oracle import make_oracle

HIDDEN, HEADS, KV_HEADS = 64, 4, 2
Q4_1 = gguf.GGMLQuantizationType.Q4_1
Q8_0 = gguf.GGMLQuantizationType.Q8_0
SHORT = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of a llama: row i of a head's first half goes to 2i, of its second
    half to 2i + 1."""
    result = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            result[head * size + 2 * i] = rows[head * size + i]
            result[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return result


def gguf_name(name: str) -> str:
    """model.layers.1.mlp.up_proj.weight -> blk.1.ffn_up.weight."""
    stem, _, kind = name.rpartition(".")
    if stem in SHORT:
        return f"{SHORT[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{SHORT[inner]}.{kind}"


def write_gguf(
    path: Path,
    architecture: str,
    weights: Mapping[str, Tensor],
    quantised: Mapping[str, gguf.GGMLQuantizationType] = {},
    **metadata: Any,
) -> Path:
    """Write Hugging Face weights as llama.cpp would; `metadata` adds to or replaces the architecture's own."""
    writer = gguf.GGUFWriter(path, architecture)
    own = {
        "embedding_length": HIDDEN,
        "feed_forward_length": 96,
        "block_count": 3,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "context_length": 256,
        "rope.freq_base": 10000.0,
    } | metadata
    for key, value in own.items():
        if value is not None:
            full = key if key.startswith(("tokenizer.", "split.")) else f"{architecture}.{key}"
            {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[
                type(value)
            ](full, value)
    for name, tensor in weights.items():
        rows = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            rows = permute(rows, HEADS if "q_proj" in name else KV_HEADS)
        kind = quantised.get(name)
        short = name if name == "rope_freqs.weight" else gguf_name(name)
        writer.add_tensor(short, quantize(rows, kind) if kind else rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hugging_face(family: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """The weights of a random tiny checkpoint."""
    make_oracle(family, folder, **changes)
    return load_file(folder / "model.safetensors")


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor that a GGUF file gives."""
    return {tensor.name: tensor.read() for tensor in open_gguf(path).tensors}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": False}),
    ],
)
def test_weights_and_config_are_those_of_the_original(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Guards against a wrong name, a permutation that is not undone (llama, biases too) or undone in vain (qwen2)."""
    original = hugging_face(architecture, tmp_path, **changes)
    end = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    path = write_gguf(tmp_path / "model.gguf", architecture, original, **end)
    read = tensors(path)
    assert read.keys() == original.keys()
    assert all(torch.equal(read[name], original[name]) for name in original)
    config, expected = open_gguf(path).config, read_config(tmp_path)
    assert config.layers == expected.layers
    for field in ("vocab_size", "norm_eps", "max_positions", "tied_embeddings", "eos_token_ids", "bos_token_id"):
        assert getattr(config, field) == getattr(expected, field), field


@torch.no_grad()
def test_a_gguf_model_gives_the_logits_of_its_original(tmp_path: Path) -> None:
    """Guards against mistakes that weights alone do not show, such as a rope that does not match the order of rows."""
    original = hugging_face("llama", tmp_path)
    path = write_gguf(tmp_path / "model.gguf", "llama", original)
    ids_SN = torch.arange(24).reshape(2, 12)
    assert load_model(path).lm_head.weight.dtype == torch.float32  # auto
    assert torch.equal(load_model(path, dtype="float32")(ids_SN), load_model(tmp_path)(ids_SN))


def test_every_end_token_counts(tmp_path: Path) -> None:
    """Guards against a chat model that goes on after its turn: Llama 3 ends turns with another token than texts."""
    original = hugging_face("llama", tmp_path)
    ends = {f"tokenizer.ggml.{name}_token_id": token for name, token in (("eos", 2), ("eot", 5), ("eom", 2))}
    assert open_gguf(write_gguf(tmp_path / "three.gguf", "llama", original, **ends)).config.eos_token_ids == (2, 5)
    assert open_gguf(write_gguf(tmp_path / "none.gguf", "llama", original)).config.eos_token_ids == ()


def test_quantised_tensors_are_dequantised(tmp_path: Path) -> None:
    """Guards against quantised bytes read in the wrong shape, or permuted before they are dequantised."""
    original = hugging_face("llama", tmp_path)
    query, down = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"
    kinds = {"model.embed_tokens.weight": Q8_0, query: Q4_1, down: Q8_0}
    read = tensors(write_gguf(tmp_path / "model.gguf", "llama", original, kinds))
    for name, kind in kinds.items():  # a row is quantised on its own, so the order of rows does not matter
        expected = torch.from_numpy(dequantize(quantize(original[name].numpy(), kind), kind))
        assert torch.equal(read[name], expected), name
        assert not torch.equal(read[name], original[name])


def test_unpermute_is_the_inverse_of_the_converter() -> None:
    """Guards against the permutation's own inverse being taken for itself: they differ from three pairs a head on."""
    rows = torch.randn(2 * 16, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpermute(torch.from_numpy(permute(rows.numpy(), 2)), 2), rows)


def rope_of(path: Path) -> Any:
    """The rope scaling of a GGUF's first layer."""
    attention = open_gguf(path).config.layers[0][0].operation
    assert isinstance(attention, GQAConfig) and attention.rope
    return attention.rope.scaling


def test_rope_scaling_is_read(tmp_path: Path) -> None:
    """Guards against a long-context model that runs with unscaled rope."""
    original = hugging_face("llama", tmp_path)
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    scaling = rope_of(write_gguf(tmp_path / "yarn.gguf", "llama", original, **yarn))
    assert (scaling.kind, scaling.factor, scaling.original_max_positions) == ("yarn", 4.0, 64)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    scaling = rope_of(write_gguf(tmp_path / "linear.gguf", "llama", original, **linear))
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)


def llama3_divisors(factor: float, original_length: int = 8192) -> Tensor:
    """`rope_freqs` as llama.cpp's converter writes it for heads of 16 dimensions and a base of 5e5."""
    divisors = []
    for i in range(0, 16, 2):
        wave = 2 * np.pi * 500000.0 ** (i / 16)
        if wave < original_length / 4:
            divisors.append(1.0)
        elif wave > original_length:
            divisors.append(factor)
        else:
            smooth = (original_length / wave - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


def test_llama3_rope_divisors_are_recognised(tmp_path: Path) -> None:
    """Guards against Llama 3.1 and 3.2, whose files hold divisors and no settings, running with unscaled rope."""
    weights = hugging_face("llama", tmp_path) | {"rope_freqs.weight": llama3_divisors(32.0)}
    path = write_gguf(tmp_path / "model.gguf", "llama", weights, **{"rope.freq_base": 500000.0})
    scaling = rope_of(path)
    assert (scaling.kind, scaling.factor, scaling.original_max_positions) == ("llama3", 32.0, 8192)
    assert "rope_freqs.weight" not in tensors(path)


def test_other_rope_divisors_are_refused(tmp_path: Path) -> None:
    """Guards against divisors that are taken for Llama 3's and are not."""
    weights = hugging_face("llama", tmp_path) | {"rope_freqs.weight": llama3_divisors(8.0, original_length=4096)}
    path = write_gguf(tmp_path / "model.gguf", "llama", weights, **{"rope.freq_base": 500000.0})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not that of a Llama 3 release"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "longrope"}, "'llama.rope.scaling.type' = 'longrope' is not supported"),
        ({"expert_count": 8}, "'llama.expert_count' = 8 not supported"),
        ({"attention.sliding_window": 64}, "'llama.attention.sliding_window' = 64 not supported"),
        ({"rope.dimension_count": 8}, "'llama.rope.dimension_count' = 8 is not supported with heads of 16"),
        ({"attention.head_count_kv": [2, 2, 1]}, "'llama.attention.head_count_kv' by layer is not supported"),
        ({"context_length": None}, "lacks 'llama.context_length'"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"attention.head_count": 0}, "'llama.attention.head_count' must be a number above 0, not 0"),
        ({"block_count": "many"}, "'llama.block_count' must be a number above 0, not 'many'"),
    ],
)
def test_unsupported_metadata_is_named(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Guards against metadata that changes results and is read past."""
    path = write_gguf(
        tmp_path / "model.gguf", "llama", {"model.embed_tokens.weight": torch.ones(8, HIDDEN)}, **metadata
    )
    with pytest.raises(ValueError, match=message):
        open_gguf(path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    """Guards against another architecture being read as a llama."""
    path = write_gguf(tmp_path / "model.gguf", "gemma2", {})
    with pytest.raises(ValueError, match="GGUF architecture 'gemma2' is not supported"):
        open_gguf(path)


def test_an_unknown_tensor_is_unexpected(tmp_path: Path) -> None:
    """Guards against a tensor that no name is known for being left out."""
    weights = hugging_face("qwen2", tmp_path, use_sliding_window=False)
    path = write_gguf(tmp_path / "model.gguf", "qwen2", weights | {"rope_freqs.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        load_model(path)


def test_a_type_without_a_float_form_is_named(tmp_path: Path) -> None:
    """Guards against integers that pass for weights."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("odd.weight", np.zeros((2, 2), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"tensor odd\.weight has an unsupported type: .*I32"):
        read_gguf(tmp_path / "model.gguf").stored("odd.weight")


@pytest.mark.parametrize("keep", [2, 20, 400, -64])
def test_a_torn_file_is_named(keep: int, tmp_path: Path) -> None:
    """Guards against half a download: torn in its magic, its counts, its metadata, its data."""
    path = write_gguf(tmp_path / "model.gguf", "llama", hugging_face("llama", tmp_path))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.gguf is (damaged|truncated)"):
        open_gguf(path)


def test_header_counts_that_lie_do_not_hang(tmp_path: Path) -> None:
    """Guards against a damaged length that asks for exabytes."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.gguf is damaged"):
        open_gguf(path)
