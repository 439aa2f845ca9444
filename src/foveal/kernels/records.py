"""Stored records that need decoding: the fp8 latent (656 bytes for DeepSeek-V3) and the index key of eight bits (132).

Byte layouts are in `foveal.config.formats`. Plain numbers need none of this: `foveal.kernels.keys.Rows`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.config.formats import LATENT_BLOCK, PAGE_SIZE, index_key_bytes
from foveal.kernels.dispatch import operation
from foveal.kernels.keys import take_rows
from foveal.kernels.quantise import e4m3_to_float32, quantise_e4m3, turn_and_quantise


@operation(differentiable=False)
def write_latents(latent_TX: Tensor, rows_T: Tensor, bytes_: Tensor, rank: int) -> None:
    """Store latents with rope keys, [T, C + R], as fp8 records at int64 rows.

    bytes_: uint8 [rows, C + 4 ceil(C/128) + 2R], written in place; rank: C. The order within a record is FlashMLA's:
    e4m3 values, float32 scales (powers of two, one for each 128 values), the rope key as bfloat16. A row that is not
    there raises ValueError, or IndexError in torch.
    """
    values, scales = quantise_e4m3(latent_TX[:, :rank], block=LATENT_BLOCK)
    rope = latent_TX[:, rank:].to(torch.bfloat16)
    parts = (part.contiguous().view(torch.uint8) for part in (values, scales, rope))
    bytes_[rows_T] = torch.cat(tuple(parts), -1)


@operation(differentiable=False)
def write_index_keys(keys_TJ: Tensor, rows_T: Tensor, pages: Tensor, dtype: str) -> None:
    """Turn, quantise (`quantise_index`) and store index keys [T, J] at int64 rows of `pages`, in place.

    pages: uint8 [B, 64 (J + 4)], see `IndexKeyRecords`; dtype: "fp8" or "int8". A row that is not there raises
    ValueError, or IndexError in torch.
    """
    values, scales = turn_and_quantise(keys_TJ, dtype)
    stored = IndexKeyRecords(pages, keys_TJ.shape[1], dtype)
    page, place = rows_T // PAGE_SIZE, rows_T % PAGE_SIZE
    stored.values[page, place] = values.view(torch.uint8)
    stored.scales[page, place] = scales


@dataclass(frozen=True)
class LatentRecords:
    """Latents as e4m3 with a float32 scale for each 128, rope keys as bfloat16: see `write_latents`."""

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
        write_latents(latent_TX.detach(), rows_T, self.bytes_, self.latent_rank)


@dataclass(frozen=True)
class RoundedRows:
    """Plain rows of numbers, [rows, ...], of another dtype than they are computed with."""

    values: Tensor
    dtype: torch.dtype
    """What `read` returns."""

    def read(self, rows: Tensor | slice) -> Tensor:
        """See `Records.read`."""
        return take_rows(self.values, rows).to(self.dtype)


@dataclass(frozen=True)
class IndexKeyRecords:
    """Index keys of eight bits with one float32 scale a key, page by page: 64 J bytes of values, then 64 scales
    (DeepGEMM's and vLLM's page layout). uint8 [B, 64 (J + 4)]. Keys are Hadamard-turned before they are quantised."""

    pages: Tensor
    head_dim: int
    dtype: str
    """Of the values: "fp8" (e4m3) or "int8"."""

    @staticmethod
    def of(keys_TJ: Tensor, dtype: str) -> "IndexKeyRecords":
        """Records of keys without a cache: [T, J] become rows 0 to T - 1."""
        count, head_dim = keys_TJ.shape
        pages, page_bytes = -(-count // PAGE_SIZE), PAGE_SIZE * index_key_bytes(head_dim, dtype)
        stored = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=keys_TJ.device)
        records = IndexKeyRecords(stored, head_dim, dtype)
        records.write(torch.arange(count, device=keys_TJ.device), keys_TJ)
        return records

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
        return self._decode(self.values[page, place], self.scales[page, place])

    def write(self, rows_T: Tensor, keys_TJ: Tensor) -> None:
        """Turn, quantise and store [T, J] at int64 rows."""
        write_index_keys(keys_TJ.detach(), rows_T, self.pages, self.dtype)

    def _read_pages(self, start: int, stop: int) -> Tensor:
        """Rows that follow one another: whole pages, then the part that was asked for."""
        first = start // PAGE_SIZE
        pages = slice(first, -(-stop // PAGE_SIZE))
        keys = self._decode(self.values[pages], self.scales[pages])
        return keys.flatten(0, 1)[start - first * PAGE_SIZE : stop - first * PAGE_SIZE]

    def _decode(self, values: Tensor, scales: Tensor) -> Tensor:
        numbers = e4m3_to_float32(values) if self.dtype == "fp8" else values.view(torch.int8).float()
        return numbers * scales[..., None]
