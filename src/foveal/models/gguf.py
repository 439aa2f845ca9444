"""GGUF files of the llama and qwen2 architectures as a checkpoint under Hugging Face names.

Format: github.com/ggml-org/ggml, docs/gguf.md. The header is read here, which takes a tenth of a second where the
`gguf` package's reader takes seconds for a large vocabulary; that package dequantises.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.config import read_config
from foveal.config.model import RopeConfig, RopeScaling
from foveal.models.weights import Checkpoint, StoredTensor
from foveal.nn.rope import frequencies_of

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"

_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
# Metadata of an architecture that `_config` reads, or that says how the file was made; anything else is refused.
_READ = {
    *_FIELDS,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
_INERT = {"rope.scaling.finetuned", "tensor_data_layout"}
_ROPE_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file; `kind` is its ggml type, `shape` has the outermost dimension first."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's metadata and the table of its tensors; `data` maps the whole file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    data: "np.memmap[Any, np.dtype[np.uint8]]"

    def stored(self, name: str) -> StoredTensor:
        """The tensor `name`, dequantised to float32 when read; ValueError for a type that cannot be."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        tensor = self.tensors[name]
        try:
            kind = GGMLQuantizationType(tensor.kind)
            byte_shape = quant_shape_to_byte_shape(tensor.shape, kind)
            dequantize(np.zeros((1, byte_shape[-1]), np.uint8), kind)  # raises where the type has no float form
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.path}: tensor {name} has an unsupported type: {error}") from None
        nbytes = math.prod(byte_shape)
        if tensor.offset + nbytes > len(self.data):
            raise ValueError(f"{self.path} is truncated: tensor {name} ends after the file does")
        raw = self.data[tensor.offset : tensor.offset + nbytes].reshape(byte_shape)
        return StoredTensor(name, tensor.shape, nbytes, lambda: torch.from_numpy(dequantize(raw, kind)))


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file (little-endian, version 2 or 3); ValueError where it is damaged."""
    try:
        # Copy-on-write: torch wants writable memory, and nothing ever writes.
        data: np.memmap[Any, np.dtype[np.uint8]] = np.memmap(path, dtype=np.uint8, mode="c")
        metadata, tensors = _Cursor(data).header()
    except (struct.error, KeyError, OverflowError, MemoryError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a GGUF file: {error}") from None
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(f"{path} is one of {metadata['split.count']} parts: merge them into one file first")
    return GGUFFile(path, metadata, tensors, data)


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file; tensors are memory-mapped, and dequantised when read.

    Raises ValueError for an architecture other than llama and qwen2, and for metadata that is not supported.
    """
    file = read_gguf(path)
    raw = _config(file)
    config = read_config(raw)
    heads = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}
    permuted = heads if raw["model_type"] == "llama" else {}
    tensors = tuple(_renamed(file.stored(name), permuted) for name in file.tensors if name != _ROPE_FREQS)
    return Checkpoint(config, tensors)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """From llama.cpp's order of a head's rows, (0, 1), (2, 3), ... turned together, to Hugging Face's, (i, i + P/2).

    `rows` is a weight [H*P, D] or a bias [H*P]. llama.cpp permutes only the llama architecture (`permute` in its
    convert_hf_to_gguf.py).
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class _Cursor:
    """Reads one value after another."""

    def __init__(self, data: "np.memmap[Any, np.dtype[np.uint8]]") -> None:
        self._data = data.data
        self._at = 0

    def header(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """Metadata and tensor table."""
        if bytes(self._take(4)) != b"GGUF":
            raise ValueError("no GGUF magic at its start")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} (only 2 and 3 are supported)")
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        metadata = {self._string(): self._value(self._scalar("I")) for _ in range(entries)}
        table = {self._string(): self._tensor() for _ in range(tensors)}
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"'general.alignment' = {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return metadata, {name: GGUFTensor(t.shape, t.kind, start + t.offset) for name, t in table.items()}

    def _tensor(self) -> GGUFTensor:
        sizes = [self._scalar("Q") for _ in range(self._scalar("I"))]
        return GGUFTensor(tuple(reversed(sizes)), kind=self._scalar("I"), offset=self._scalar("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(kind=self._scalar("I"), count=self._scalar("Q"))
        value = self._scalar(_SCALARS[kind])
        # 1e-5 is stored as 9.99999975e-06: take the shortest decimal that means the same float32.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * size)))
        return [self._value(kind) for _ in range(count)]

    def _string(self) -> str:
        return str(self._take(self._scalar("Q")), encoding="utf-8")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _take(self, count: int) -> memoryview:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError("it ends inside its header")
        self._at += count
        return taken


def _renamed(tensor: StoredTensor, permuted: Mapping[str, int]) -> StoredTensor:
    """Under its Hugging Face name, rows in Hugging Face's order; a name that is not known stays as it is."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
    if match is None or match[2] not in _INNER:
        return StoredTensor(_OUTER.get(tensor.name, tensor.name), tensor.shape, tensor.nbytes, tensor.read)
    name = f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"
    heads, read = permuted.get(match[2]), tensor.read
    if heads is None:
        return StoredTensor(name, tensor.shape, tensor.nbytes, read)
    return StoredTensor(name, tensor.shape, tensor.nbytes, lambda: unpermute(read(), heads))


def _config(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as a Hugging Face config.json."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise ValueError(f"{file.path}: GGUF architecture {architecture!r} is not supported (only llama and qwen2)")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    _refuse_unknown(file.path, prefix, own)
    for key in (*_FIELDS, "attention.head_count_kv"):
        if isinstance(own.get(key), list):
            raise ValueError(f"{file.path}: '{prefix}{key}' by layer is not supported: {own[key]}")
        if key in own and (not isinstance(own[key], int | float) or own[key] <= 0):
            raise ValueError(f"{file.path}: '{prefix}{key}' must be a number above 0, not {own[key]!r}")
    missing = [key for key in _FIELDS if key not in own]
    if missing or "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks '{prefix + missing[0] if missing else 'token_embd.weight'}'")
    config = {name: own[key] for key, name in _FIELDS.items()}
    heads = config["num_attention_heads"]
    return config | {
        "model_type": architecture,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": _head_dim(file.path, prefix, own),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": architecture == "llama" and "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": own.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, prefix, own),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(file.metadata),
        "dtype": "float32",
    }


def _eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ends of a text, of a turn and of a message: llama.cpp stops at all of them."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _refuse_unknown(path: Path, prefix: str, own: Mapping[str, Any]) -> None:
    known = _READ | _INERT | _ROPE_SCALING.keys()
    unknown = sorted(key for key, value in own.items() if key not in known and value not in (0, False, "", []))
    if unknown:
        named = ", ".join(f"'{prefix}{key}' = {own[key]!r}" for key in unknown)
        raise ValueError(f"{path}: {named} not supported: it may change results")


def _head_dim(path: Path, prefix: str, own: Mapping[str, Any]) -> int:
    """The one width of heads; rotary embedding turns all of it."""
    default = own["embedding_length"] // own["attention.head_count"]
    head_dim = int(own.get("attention.key_length", default))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(f"{path}: '{prefix}{key}' = {own[key]} is not supported with heads of {head_dim}")
    return head_dim


def _rope_scaling(file: GGUFFile, prefix: str, own: Mapping[str, Any]) -> dict[str, Any] | None:
    scaling = {name: own[key] for key, name in _ROPE_SCALING.items() if key in own}
    kind = scaling.get("rope_type", "none")
    if _ROPE_FREQS in file.tensors:
        if kind != "none":
            raise ValueError(f"{file.path}: {_ROPE_FREQS} with '{prefix}rope.scaling.type' = {kind!r} is not supported")
        return _llama3_scaling(file, prefix, own)
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.path}: '{prefix}rope.scaling.type' = {kind!r} is not supported (only linear and yarn)")
    return None if kind == "none" else scaling


def _llama3_scaling(file: GGUFFile, prefix: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The llama3 rope settings that give the divisors in `rope_freqs`; a file keeps only those.

    All Llama 3.1 to 3.3 releases differ in `factor` alone, which is the largest divisor.
    """
    divisors_R = file.stored(_ROPE_FREQS).read()
    scaling = RopeScaling("llama3", float(divisors_R.max()), 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = RopeConfig(_head_dim(file.path, prefix, own), float(own.get("rope.freq_base", 10000.0)))
    expected_R = frequencies_of(plain) / frequencies_of(replace(plain, scaling=scaling))
    if divisors_R.shape != expected_R.shape or not torch.allclose(divisors_R, expected_R, rtol=1e-4):
        raise ValueError(f"{file.path}: tensor {_ROPE_FREQS} is not that of a Llama 3 release, which is not supported")
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
