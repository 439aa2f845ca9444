"""Weights of a safetensors checkpoint as numpy arrays, without torch: bfloat16 and fp8 included, which numpy lacks."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveal.config.model import Fp8Blocks

Array = NDArray[np.float32]
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8}
_LONGEST_HEADER = 100_000_000  # as in the safetensors library


@dataclass(frozen=True)
class _Entry:
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """The tensors of a directory, read one by one. Raises ValueError for files that are damaged."""

    def __init__(self, directory: Path, fp8_blocks: Fp8Blocks | None) -> None:
        self._directory, self._blocks = directory, fp8_blocks or Fp8Blocks()
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{directory} holds no .safetensors files: the latent ranks need the weights")
        self._entries = {name: entry for file in files for name, entry in _header(file).items()}

    def read(self, name: str) -> Array:
        """A tensor as float32, fp8 blocks multiplied with their scales. ValueError where it is missing or of a dtype
        that is not known."""
        values = self._values(name)
        if self._entries[name].dtype != "F8_E4M3":
            return values
        scales = self._values(f"{name}_scale_inv")
        rows, columns = values.shape
        spread = scales.repeat(self._blocks.rows, 0)[:rows].repeat(self._blocks.columns, 1)[:, :columns]
        if spread.shape != values.shape:
            raise ValueError(f"{name}_scale_inv {list(scales.shape)} does not fit weights {list(values.shape)}")
        return values * spread

    def _values(self, name: str) -> Array:
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{self._directory} has no tensor {name}")
        if entry.dtype not in _STORED:
            raise ValueError(f"{name} is stored as {entry.dtype}, which is not supported (only {', '.join(_STORED)})")
        stored = np.fromfile(entry.file, _STORED[entry.dtype], int(np.prod(entry.shape)), offset=entry.offset)
        if stored.size != np.prod(entry.shape):
            raise ValueError(f"{entry.file} is damaged: {name} is cut short")
        if entry.dtype == "BF16":  # the upper half of a float32
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        elif entry.dtype == "F8_E4M3":
            stored = _E4M3[stored]
        return stored.astype(np.float32).reshape(entry.shape)


def _header(file: Path) -> dict[str, _Entry]:
    """Eight bytes of length, a JSON object of names, then the data (safetensors README, "Format")."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
        raw = stream.read(length) if length <= _LONGEST_HEADER else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        return {
            name: _Entry(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{file} is damaged or not a safetensors file") from None


def _e4m3_values() -> Array:
    """The 256 numbers of e4m3: sign, four bits of exponent (bias 7), three of mantissa; all ones is not a number
    (arXiv 2209.05433, table 1)."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(exponent == 15) & (mantissa == 7)] = np.nan
    return np.where(byte >= 128, -values, values).astype(np.float32)


_E4M3 = _e4m3_values()
