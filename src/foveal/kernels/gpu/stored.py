"""What stored latents consist of, as the kernels read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.kernels.keys import Columns, KeySource, OneHead, Rows
from foveal.kernels.records import LatentRecords


@dataclass(frozen=True)
class Latents:
    """Stored latents: rows of numbers, or fp8 records as bytes, one row after another."""

    rows: Tensor
    rank: int
    fp8: bool
    dtype: torch.dtype
    """What they are read as."""


def latents_of(keys: KeySource, values: KeySource) -> Latents | None:
    """The stored rows, where these are latents whose first numbers are the values; None where they are not."""
    records = keys.records
    if not isinstance(records, OneHead) or not isinstance(values.records, Columns):
        return None
    if values.records.records is not records or values.contexts is not keys.contexts:
        return None
    stored, rank = records.records, values.records.count
    if isinstance(stored, Rows) and stored.values.dim() == 2 and stored.values.stride(1) == 1:
        return Latents(stored.values, rank, False, stored.values.dtype)
    if isinstance(stored, LatentRecords) and stored.latent_rank == rank and stored.bytes_.is_contiguous():
        return Latents(stored.bytes_, rank, True, stored.dtype)
    return None
