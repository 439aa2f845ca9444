"""Score and select (csrc/kernels/select.cpp)."""

import torch
from torch import Tensor

from foveal.config.formats import PAGE_SIZE
from foveal.kernels.cpu.library import FORMATS, Kernels, address, compiled
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.keys import KeySource, Queries, Records, Rows
from foveal.kernels.records import IndexKeyRecords
from foveal.kernels.selection import select

_FLOATS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
_RECORD_FORMATS = {"fp8": FORMATS[torch.float8_e4m3fn], "int8": FORMATS[torch.int8]}
# Sums of products of int8 stay far below 2^31.
_MOST_NUMBERS = 1 << 14


def _accepts(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> bool:
    records = keys.records
    if isinstance(records, IndexKeyRecords):
        wanted = (torch.int8,) if records.dtype == "int8" else _FLOATS
        stored = records.pages
    elif isinstance(records, Rows) and records.values.dtype in (torch.float32, torch.bfloat16):
        wanted, stored = _FLOATS, records.values
    else:
        return False
    return (
        q_TIJ.dtype in wanted
        and weights_TI.dtype == torch.float32
        and 0 < q_TIJ.shape[2] <= _MOST_NUMBERS
        and q_TIJ.shape[1] > 0
        and stored.dim() == 2
        and stored.stride(1) == 1
        and topk > 0
    )


@compiled(select, _accepts)
def _select(
    kernels: Kernels, q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int
) -> Tensor:
    count, heads, size = q_TIJ.shape
    data, key_format, stride, rows, key_size = stored_keys(keys.records)
    if key_size != size:
        raise ValueError(f"queries have {size} numbers, keys {key_size}")
    if weights_TI.shape != (count, heads):
        raise ValueError(f"weights have shape {tuple(weights_TI.shape)}, queries {tuple(q_TIJ.shape)}")
    q_TIJ, weights_TI = q_TIJ.contiguous(), weights_TI.contiguous()
    selection_TK = torch.empty(count, topk, dtype=torch.int32)
    kernels.run.select(
        *(address(q_TIJ), FORMATS[q_TIJ.dtype], address(weights_TI), heads, size),
        *(address(data), key_format, stride, rows),
        *sequence_arguments(count, queries, keys.contexts),
        *(topk, address(selection_TK), torch.get_num_threads()),
    )
    return selection_TK


def stored_keys(records: Records) -> tuple[Tensor, int, int, int, int]:
    """Memory, its format, bytes from a row (or a page of records) to the next, rows, numbers of a key."""
    if isinstance(records, IndexKeyRecords):
        pages, width = records.pages, PAGE_SIZE * (records.head_dim + 4)
        if pages.dtype != torch.uint8 or pages.shape[1] != width:
            raise ValueError(f"pages of {width} bytes do not fit {pages.dtype} of shape {tuple(pages.shape)}")
        return pages, _RECORD_FORMATS[records.dtype], pages.stride(0), PAGE_SIZE * len(pages), records.head_dim
    assert isinstance(records, Rows)
    values = records.values
    return values, FORMATS[values.dtype], values.stride(0) * values.itemsize, *values.shape
