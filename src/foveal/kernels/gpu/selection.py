"""The Triton version of `select`: what it accepts."""

import torch
from torch import Tensor

from foveal.kernels.gpu.library import triton_version
from foveal.kernels.keys import KeySource, Queries, Rows
from foveal.kernels.records import IndexKeyRecords
from foveal.kernels.selection import select

_FLOATS = (torch.float32, torch.bfloat16)
# A tile holds all heads of a query, whole.
_MOST_HEADS, _MOST_NUMBERS, _MOST_SELECTED = 128, 256, 1 << 14


def _accepts(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> bool:
    records = keys.records
    if isinstance(records, IndexKeyRecords):
        wanted: tuple[torch.dtype, ...] = (torch.int8,) if records.dtype == "int8" else (*_FLOATS, torch.float8_e4m3fn)
        stored = records.pages
        aligned = stored.stride(0) % 4 == 0 and stored.storage_offset() % 4 == 0
    elif isinstance(records, Rows) and records.values.dtype in _FLOATS:
        wanted, stored, aligned = _FLOATS, records.values, True
    else:
        return False
    fits = 0 < q_TIJ.shape[1] <= _MOST_HEADS and 0 < q_TIJ.shape[2] <= _MOST_NUMBERS and 0 < topk <= _MOST_SELECTED
    dtypes = q_TIJ.dtype in wanted and weights_TI.dtype == torch.float32
    return fits and dtypes and aligned and stored.dim() == 2 and stored.stride(1) == 1


@triton_version(select, _accepts)
def top(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> Tensor:
    """`select`, in one stream over the keys."""
    from foveal.kernels.gpu.select import select_top

    launches, selection_TK = select_top(q_TIJ, weights_TI, keys, queries, topk=topk)
    for launch in launches:
        launch.run()
    return selection_TK
