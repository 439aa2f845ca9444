"""Rounding to eight bits, into memory of its own or straight into the cache (csrc/kernels/quantise.cpp)."""

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE, index_key_bytes, latent_bytes
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled
from foveal.kernels.quantise import quantise_index
from foveal.kernels.records import write_index_keys, write_latents

_VALUES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# MOST_INDEX_NUMBERS in csrc/kernels/quantise.h.
MOST_NUMBERS = 1024


def _turns(x: Tensor, dtype: str) -> bool:
    return x.dtype in DTYPES and dtype in _VALUES and 0 < x.shape[-1] <= MOST_NUMBERS


@compiled(quantise_index, _turns)
def _quantise_index(kernels: Kernels, x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    index_key_bytes(size, dtype)  # refuses what cannot be turned
    rows = x.contiguous()
    values = torch.empty(x.shape, dtype=_VALUES[dtype])
    scales = torch.empty(x.shape[:-1], dtype=torch.float32)
    kernels.run.quantise_index(
        *(address(rows), size, FORMATS[x.dtype], FORMATS[_VALUES[dtype]], scales.numel(), size),
        *(address(values), address(scales), torch.get_num_threads()),
    )
    return values, scales


def _accepts_keys(keys_TJ: Tensor, rows_T: Tensor, pages: Tensor, dtype: str) -> bool:
    return _turns(keys_TJ, dtype) and keys_TJ.stride(1) == 1 and pages.stride(1) == 1


@compiled(write_index_keys, _accepts_keys)
def _write_index_keys(kernels: Kernels, keys_TJ: Tensor, rows_T: Tensor, pages: Tensor, dtype: str) -> None:
    count, size = keys_TJ.shape
    _check(rows_T, count, pages, PAGE_SIZE * index_key_bytes(size, dtype))
    rows_T = rows_T.contiguous()
    kernels.run.write_index_keys(
        *(address(keys_TJ), keys_TJ.stride(0), FORMATS[keys_TJ.dtype], FORMATS[_VALUES[dtype]], count, size),
        *(address(rows_T), address(pages), pages.shape[0], pages.stride(0), torch.get_num_threads()),
    )


def _accepts_latents(latent_TX: Tensor, rows_T: Tensor, bytes_: Tensor, rank: int) -> bool:
    return latent_TX.dtype in DTYPES and latent_TX.stride(1) == 1 and bytes_.is_contiguous()


@compiled(write_latents, _accepts_latents)
def _write_latents(kernels: Kernels, latent_TX: Tensor, rows_T: Tensor, bytes_: Tensor, rank: int) -> None:
    count, width = latent_TX.shape
    if not 0 <= rank <= width:
        raise ValueError(f"latents of rank {rank} do not fit into rows of {width} numbers")
    _check(rows_T, count, bytes_, latent_bytes(rank, width - rank, "fp8"))
    rows_T = rows_T.contiguous()
    kernels.run.write_latents(
        *(address(latent_TX), latent_TX.stride(0), FORMATS[latent_TX.dtype], count, rank, width - rank),
        *(address(rows_T), address(bytes_), *bytes_.shape, torch.get_num_threads()),
    )


def _check(rows_T: Tensor, count: int, stored: Tensor, width: int) -> None:
    if rows_T.shape != (count,) or rows_T.dtype != torch.int64:
        raise ValueError(f"{count} values, but rows are {rows_T.dtype} of shape {tuple(rows_T.shape)}")
    if stored.dtype != torch.uint8 or stored.shape[1:] != (width,):
        raise ValueError(f"records of {width} bytes do not fit {stored.dtype} of shape {tuple(stored.shape)}")
