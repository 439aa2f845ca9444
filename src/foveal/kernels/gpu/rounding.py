"""Rounding to eight bits: Hadamard turns of index queries and keys, and the writers of the cache records.

Rounding is done on the bits, in integers: the same on every card, in the interpreter and in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.config.formats import LATENT_BLOCK, PAGE_SIZE, index_key_bytes, latent_bytes
from foveal.kernels.gpu.code import bfloat16_bits, encode_e4m3, inverse_power_of_two, power_of_two_scale
from foveal.kernels.gpu.launch import Launch, block_size, ceil_div

_ROWS = 8


@triton.jit
def turn(x_TJ, J: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """The Walsh-Hadamard transform of each row, not yet scaled: sums and differences of numbers ever farther apart."""
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(x_TJ, [ROWS, J >> (step + 1), 2, 1 << step])
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x_TJ = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), [ROWS, J])
    return x_TJ


@triton.jit
def index_kernel(
    x,
    rows,
    values,
    scales,
    count,
    x_stride,
    pages,
    norm,
    J: tl.constexpr,
    STEPS: tl.constexpr,
    INT8: tl.constexpr,
    STORED: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turn and round a few vectors; keep them in order, or (STORED) at `rows` of the cache's pages. A row that is not
    there is left out."""
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = tl.arange(0, J)
    live = t < count
    x_TJ = tl.load(x + t[:, None] * x_stride + j[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    x_TJ = turn(x_TJ, J, STEPS, ROWS) * norm
    amax_T = tl.max(tl.abs(x_TJ), 1)
    if INT8:
        scale_T = tl.div_rn(tl.maximum(amax_T, 1e-4), 127.0)
        ratio = tl.div_rn(x_TJ, tl.broadcast_to(scale_T[:, None], [ROWS, J]))
        # Adding 1.5 * 2^23 rounds to whole numbers, ties to even.
        whole = (ratio + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        bits = tl.minimum(tl.maximum(whole, -127), 127).to(tl.int8).to(tl.uint8, bitcast=True)
    else:
        scale_T = power_of_two_scale(amax_T)
        bits = encode_e4m3(x_TJ * inverse_power_of_two(scale_T)[:, None])
    if STORED:
        row = tl.load(rows + t, mask=live, other=-1)
        live = live & (row >= 0) & (row < pages * 64)
        page, place = row // 64, row % 64
        value_at, scale_at = page * PAGE_STRIDE + place * J, page * (PAGE_STRIDE // 4) + 16 * J + place
    else:
        value_at, scale_at = t * J, t
    tl.store(values + value_at[:, None] + j[None, :], bits, mask=live[:, None])
    tl.store(scales + scale_at, scale_T, mask=live)


@triton.jit
def latent_kernel(
    x,
    rows,
    values,
    scales,
    rope,
    count,
    x_stride,
    stored,
    C: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    ROPE_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One record: scales of each block, e4m3 values, the rope key as bfloat16. A row that is not there is left out."""
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + t)
    if (row < 0) | (row >= stored):
        return
    b = tl.arange(0, BLOCKS)
    c = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x_BC = tl.load(x + t * x_stride + c, mask=c < C, other=0.0).to(tl.float32)
    scale_B = power_of_two_scale(tl.max(tl.abs(x_BC), 1))
    tl.store(values + row * STRIDE + c, encode_e4m3(x_BC * inverse_power_of_two(scale_B)[:, None]), mask=c < C)
    tl.store(scales + row * (STRIDE // 4) + C // 4 + b, scale_B, mask=b * BLOCK < C)
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        key = tl.load(x + t * x_stride + C + r, mask=r < R, other=0.0).to(tl.float32)
        tl.store(rope + row * (STRIDE // 2) + ROPE_AT + r, bfloat16_bits(key), mask=r < R)


def round_index(x: Tensor, dtype: str) -> tuple[Launch, Tensor, Tensor]:
    """Plan `quantise_index`: the launch, values and scales."""
    size = x.shape[-1]
    index_key_bytes(size, dtype)  # refuses what cannot be turned
    values = torch.empty(x.shape, dtype=torch.int8 if dtype == "int8" else torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows_TJ = x.reshape(-1, size)
    rows_TJ = rows_TJ if rows_TJ.stride(1) == 1 else rows_TJ.contiguous()
    return _index_launch(rows_TJ, dtype, None, values.view(torch.uint8), scales, 0), values, scales


def store_index_keys(keys_TJ: Tensor, rows_T: Tensor, pages: Tensor, dtype: str) -> Launch:
    """Plan `write_index_keys`."""
    count, size = keys_TJ.shape
    _check(rows_T, count, pages, PAGE_SIZE * index_key_bytes(size, dtype))
    return _index_launch(keys_TJ, dtype, rows_T.contiguous(), pages, pages.view(torch.float32), pages.stride(0))


def _index_launch(
    x_TJ: Tensor, dtype: str, rows_T: Tensor | None, values: Tensor, scales: Tensor, page_stride: int
) -> Launch:
    count, size = x_TJ.shape
    # As torch rounds it.
    norm = torch.tensor(size**-0.5, dtype=torch.float32).item()
    pages = 0 if rows_T is None else len(values)
    return Launch(
        index_kernel,
        (ceil_div(count, _ROWS),),
        {
            "x": x_TJ,
            "rows": x_TJ if rows_T is None else rows_T,
            "values": values,
            "scales": scales,
            "count": count,
            "x_stride": x_TJ.stride(0),
            "pages": pages,
            "norm": norm,
        },
        {
            "J": size,
            "STEPS": size.bit_length() - 1,
            "INT8": dtype == "int8",
            "STORED": rows_T is not None,
            "PAGE_STRIDE": page_stride,
            "ROWS": _ROWS,
        },
    )


def store_latents(latent_TX: Tensor, rows_T: Tensor, bytes_: Tensor, rank: int) -> Launch:
    """Plan `write_latents`, for records whose parts are aligned."""
    count, width = latent_TX.shape
    if not 0 <= rank <= width:
        raise ValueError(f"latents of rank {rank} do not fit into rows of {width} numbers")
    _check(rows_T, count, bytes_, latent_bytes(rank, width - rank, "fp8"))
    block = block_size(min(rank, LATENT_BLOCK))
    blocks = ceil_div(rank, LATENT_BLOCK)
    return Launch(
        latent_kernel,
        (count,),
        {
            "x": latent_TX,
            "rows": rows_T.contiguous(),
            "values": bytes_,
            "scales": bytes_.view(torch.float32),
            "rope": bytes_.view(torch.int16),
            "count": count,
            "x_stride": latent_TX.stride(0),
            "stored": len(bytes_),
        },
        {
            "C": rank,
            "R": width - rank,
            "STRIDE": bytes_.shape[1],
            "ROPE_AT": (rank + 4 * blocks) // 2,
            "BLOCK": block,
            "BLOCKS": block_size(blocks, 1),
            "BLOCK_R": block_size(width - rank),
        },
        warps=4 if rank > LATENT_BLOCK else 1,
    )


def _check(rows_T: Tensor, count: int, stored: Tensor, width: int) -> None:
    if rows_T.shape != (count,) or rows_T.dtype != torch.int64:
        raise ValueError(f"{count} values, but rows are {rows_T.dtype} of shape {tuple(rows_T.shape)}")
    if stored.dtype != torch.uint8 or stored.shape[1:] != (width,):
        raise ValueError(f"records of {width} bytes do not fit {stored.dtype} of shape {tuple(stored.shape)}")
