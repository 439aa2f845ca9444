"""Types of PTX as numpy's, and the narrow floats that numpy does not have."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    **{f"{letter}{8 * size}": np.dtype(f"u{size}").type for letter in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}").type for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}").type for size in (2, 4, 8)},
}
Lanes = NDArray[Any]


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest, ties to even."""
    return _bits(values, torch.bfloat16).view(np.uint16)


def from_e4m3(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Exactly."""
    return torch.tensor(bits).view(torch.float8_e4m3fn).float().numpy()


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """To the nearest, ties to even, at most 448."""
    return _bits(values.clip(-448, 448), torch.float8_e4m3fn).view(np.uint8)


def _bits(values: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.generic]:
    rounded = torch.tensor(values).to(dtype)
    return rounded.view(torch.int16 if dtype.itemsize == 2 else torch.int8).numpy()


def parts(values: Lanes, size: int) -> Lanes:
    """[..., numbers of `size` bytes] that stand in each value, the lowest first."""
    return np.ascontiguousarray(values)[..., None].view(f"u{size}")


def decoded(bits: Lanes, kind: str) -> NDArray[np.float64]:
    """[..., numbers]: what each value holds of `kind` (bf16, f16, e4m3, s8), exactly."""
    match kind:
        case "bf16":
            return from_bfloat16(parts(bits, 2)).astype(np.float64)
        case "f16":
            return parts(bits, 2).view(np.float16).astype(np.float64)
        case "e4m3":
            return from_e4m3(parts(bits, 1)).astype(np.float64)
        case "s8":
            return parts(bits, 1).view(np.int8).astype(np.float64)
    raise NotImplementedError(f"products of {kind}")
