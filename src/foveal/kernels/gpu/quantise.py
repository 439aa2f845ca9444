"""The Triton versions of the eight-bit rounding and of the records' writers: what they accept."""

import torch
from torch import Tensor

from foveal.config.formats import latent_bytes
from foveal.kernels.gpu.library import triton_version
from foveal.kernels.quantise import quantise_index
from foveal.kernels.records import write_index_keys, write_latents

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_NUMBERS = 1024


def _turns(x: Tensor, dtype: str) -> bool:
    return x.dtype in _DTYPES and dtype in ("fp8", "int8") and 0 < x.shape[-1] <= _MOST_NUMBERS


@triton_version(quantise_index, _turns)
def index(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """`quantise_index`."""
    from foveal.kernels.gpu.rounding import round_index

    launch, values, scales = round_index(x, dtype)
    launch.run()
    return values, scales


def _accepts_keys(keys_TJ: Tensor, rows_T: Tensor, pages: Tensor, dtype: str) -> bool:
    aligned = pages.stride(1) == 1 and pages.stride(0) % 4 == 0 and pages.storage_offset() % 4 == 0
    return _turns(keys_TJ, dtype) and keys_TJ.stride(1) == 1 and aligned


@triton_version(write_index_keys, _accepts_keys)
def index_keys(keys_TJ: Tensor, rows_T: Tensor, pages: Tensor, dtype: str) -> None:
    """`write_index_keys`. A row that is not there is left out: looking for one would make the host wait."""
    from foveal.kernels.gpu.rounding import store_index_keys

    store_index_keys(keys_TJ, rows_T, pages, dtype).run()


def _accepts_latents(latent_TX: Tensor, rows_T: Tensor, bytes_: Tensor, rank: int) -> bool:
    size = latent_bytes(rank, latent_TX.shape[1] - rank, "fp8")
    aligned = rank > 0 and rank % 4 == 0 and size % 4 == 0 and bytes_.storage_offset() % 4 == 0
    return latent_TX.dtype in _DTYPES and latent_TX.stride(1) == 1 and bytes_.is_contiguous() and aligned


@triton_version(write_latents, _accepts_latents)
def latents(latent_TX: Tensor, rows_T: Tensor, bytes_: Tensor, rank: int) -> None:
    """`write_latents`. A row that is not there is left out: looking for one would make the host wait."""
    from foveal.kernels.gpu.rounding import store_latents

    store_latents(latent_TX, rows_T, bytes_, rank).run()
