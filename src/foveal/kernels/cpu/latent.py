"""Absorbed latent attention (csrc/kernels/latent.cpp): one key row for all heads, its first numbers the value."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.config.formats import latent_bytes
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.keys import Columns, KeySource, OneHead, Queries, Rows
from foveal.kernels.records import LatentRecords


@dataclass(frozen=True)
class LatentRows:
    """Stored latents: [rows, bytes or numbers], one after another in each row."""

    rows: Tensor
    format: int
    dtype: torch.dtype
    """What they are read as."""


def latent_rows(keys: KeySource, values: KeySource) -> LatentRows | None:
    """The stored rows, where these are latents whose first numbers are the values; None where they are not."""
    records = keys.records
    if not isinstance(records, OneHead) or not isinstance(values.records, Columns):
        return None
    if values.records.records is not records or values.contexts is not keys.contexts:
        return None
    stored = records.records
    if isinstance(stored, Rows) and stored.values.dim() == 2:
        return LatentRows(stored.values, FORMATS.get(stored.values.dtype, -1), stored.values.dtype)
    if (
        isinstance(stored, LatentRecords)
        and stored.bytes_.stride(1) == 1
        and stored.latent_rank == values.records.count
    ):
        return LatentRows(stored.bytes_, FORMATS[torch.float8_e4m3fn], stored.dtype)
    return None


def serves(q_THP: Tensor, latents: LatentRows | None) -> bool:
    """Whether the kernel can read these rows for these queries."""
    if latents is None or q_THP.dtype not in DTYPES or q_THP.dtype != latents.dtype or latents.rows.stride(1) != 1:
        return False
    return not (latents.rows.requires_grad and torch.is_grad_enabled())


def run(
    kernels: Kernels,
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    selection_TK: Tensor | None,
    queries: Queries,
    scale: float,
) -> Tensor:
    """Attention over all earlier keys, or over a selection (int32, contiguous). Raises ValueError where shapes do not
    fit, or a page table names a page that is not there."""
    latents = latent_rows(keys, values)
    assert latents is not None and isinstance(values.records, Columns)
    tokens, heads, width = q_THP.shape
    rank, rows = values.records.count, latents.rows
    check_widths(width, rank, rows)
    q_THP = q_THP.contiguous()
    out_THV = torch.empty(tokens, heads, rank, dtype=q_THP.dtype)
    kernels.run.latent_attention(
        *(address(q_THP), address(out_THV), FORMATS[q_THP.dtype]),
        *(address(rows), rows.stride(0) * rows.element_size(), rows.shape[0], latents.format),
        *(heads, width, rank, scale),
        *sequence_arguments(tokens, queries, keys.contexts),
        *(address(selection_TK), 0 if selection_TK is None else selection_TK.shape[1]),
        torch.get_num_threads(),
    )
    return out_THV


def check_widths(width: int, rank: int, rows: Tensor) -> None:
    """ValueError unless rows are as wide as latents of so many numbers, the first `rank` of them values."""
    fp8 = rows.dtype == torch.uint8
    expected = latent_bytes(rank, width - rank, "fp8") if fp8 else width
    if rank > width or rows.shape[1] != expected:
        what = f"queries are {width} wide and values {rank}"
        raise ValueError(f"{what}: latent rows need {expected} numbers, not {rows.shape[1]}")
