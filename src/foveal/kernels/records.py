"""Stored records that need decoding: the fp8 latent (656 bytes for DeepSeek-V3) and the fp8 index key (132 bytes).

Byte layouts are in `foveal.config.formats`. Plain numbers need none of this: `foveal.kernels.keys.Rows`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.config.formats import LATENT_BLOCK, PAGE_SIZE
from foveal.kernels.keys import take_rows
from foveal.kernels.quantise import e4m3_to_float32, hadamard, quantise_e4m3


@dataclass(frozen=True)
class LatentRecords:
    """Latents as e4m3 with a float32 scale for each 128, rope keys as bfloat16: uint8 [rows, C + 4 ceil(C/128) + 2R].

    The order within a record is FlashMLA's: values, scales, rope key.
    """

    bytes_: Tensor
    latent_rank: int
    dtype: torch.dtype
    """What `read` returns: [..., C + R]."""

    def read(self, rows: Tensor | slice) -> Tensor:
        """See `Records.read`."""
        record = take_rows(self.bytes_, rows)
        rank, blocks = self.latent_rank, -(-self.latent_rank // LATENT_BLOCK)
        values = e4m3_to_float32(record[..., :rank])
        scales = record[..., rank : rank + 4 * blocks].contiguous().view(torch.float32)
        rope = record[..., rank + 4 * blocks :].contiguous().view(torch.bfloat16)
        scaled = values * scales.repeat_interleave(LATENT_BLOCK, -1)[..., :rank]
        return torch.cat((scaled.to(self.dtype), rope.to(self.dtype)), -1)

    def write(self, rows_T: Tensor, latent_TX: Tensor) -> None:
        """Store [T, C + R] at int64 rows."""
        rank = self.latent_rank
        values, scales = quantise_e4m3(latent_TX[:, :rank], block=LATENT_BLOCK)
        rope = latent_TX[:, rank:].to(torch.bfloat16)
        parts = (part.contiguous().view(torch.uint8) for part in (values, scales, rope))
        self.bytes_[rows_T] = torch.cat(tuple(parts), -1)


@dataclass(frozen=True)
class IndexKeyRecords:
    """Index keys as e4m3 with one float32 scale a key, page by page: 64 J bytes of values, then 64 scales (DeepGEMM's
    and vLLM's page layout). uint8 [B, 64 (J + 4)]. Keys are Hadamard-turned before they are quantised."""

    pages: Tensor
    head_dim: int

    @property
    def values(self) -> Tensor:
        """uint8 [B, 64, J], a view."""
        return self.pages[:, : PAGE_SIZE * self.head_dim].unflatten(1, (PAGE_SIZE, self.head_dim))

    @property
    def scales(self) -> Tensor:
        """float32 [B, 64], a view."""
        return self.pages[:, PAGE_SIZE * self.head_dim :].view(torch.float32)

    def read(self, rows: Tensor | slice) -> Tensor:
        """See `Records.read`: float32 [..., J], scale applied."""
        if isinstance(rows, slice):
            return self._read_pages(rows.start, rows.stop)
        page, place = rows // PAGE_SIZE, rows % PAGE_SIZE
        return e4m3_to_float32(self.values[page, place]) * self.scales[page, place][..., None]

    def write(self, rows_T: Tensor, keys_TJ: Tensor) -> None:
        """Turn, quantise and store [T, J] at int64 rows."""
        values, scales = quantise_index(keys_TJ)
        page, place = rows_T // PAGE_SIZE, rows_T % PAGE_SIZE
        self.values[page, place] = values.view(torch.uint8)
        self.scales[page, place] = scales

    def _read_pages(self, start: int, stop: int) -> Tensor:
        """Rows that follow one another: whole pages, then the part that was asked for."""
        first = start // PAGE_SIZE
        pages = slice(first, -(-stop // PAGE_SIZE))
        keys = e4m3_to_float32(self.values[pages]) * self.scales[pages][..., None]
        return keys.flatten(0, 1)[start - first * PAGE_SIZE : stop - first * PAGE_SIZE]


def quantise_index(x: Tensor) -> tuple[Tensor, Tensor]:
    """Hadamard, then e4m3 with one scale a vector: index queries and keys alike. Returns ([..., J], [...])."""
    values, scale = quantise_e4m3(hadamard(x.float()), block=x.shape[-1])
    return values, scale[..., 0]
