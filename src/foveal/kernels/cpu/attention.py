"""Dense attention: heads in groups (csrc/kernels/flash.cpp) and absorbed MLA (csrc/kernels/latent.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.cpu import latent
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.dense import attention
from foveal.kernels.flash import flash_forward
from foveal.kernels.keys import KeySource, OneHead, Queries, Rows
from foveal.kernels.sparse import check_selection_shape


def accepts_rows(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    selection_TK: Tensor | None = None,
) -> bool:
    """Keys and values by head as plain rows at the same places, in the queries' format."""
    if not (isinstance(keys.records, Rows) and isinstance(values.records, Rows)):
        return False
    tensors = (q_THP, keys.records.values, values.records.values)
    return (
        keys.contexts is values.contexts
        and q_THP.dtype in DTYPES
        and all(x.dtype == q_THP.dtype and x.dim() == 3 and x.stride(2) == 1 for x in tensors)
        and (selection_TK is None or selection_TK.dtype == torch.int32)
        and scale > 0
    )


def _accepts(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    selection_TK: Tensor | None = None,
) -> bool:
    if isinstance(keys.records, OneHead):
        plain = window is None and sinks == 0 and selection_TK is None
        return plain and latent.serves(q_THP, latent.latent_rows(keys, values))
    return accepts_rows(
        q_THP, keys, values, queries, scale=scale, window=window, sinks=sinks, selection_TK=selection_TK
    )


@compiled(attention, _accepts)
def _attention(
    kernels: Kernels,
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    selection_TK: Tensor | None = None,
) -> Tensor:
    if isinstance(keys.records, OneHead):
        return latent.run(kernels, q_THP, keys, values, None, queries, scale)
    assert isinstance(keys.records, Rows) and isinstance(values.records, Rows)
    k_NGP, v_NGV = keys.records.values, values.records.values
    _check_shapes(q_THP, k_NGP, v_NGV)
    if sinks < 0:
        raise ValueError(f"sinks must not be negative, not {sinks}")
    if selection_TK is not None:
        check_selection_shape(selection_TK, len(q_THP))
        selection_TK = selection_TK.contiguous()
    out_THV = q_THP.new_empty(*q_THP.shape[:2], v_NGV.shape[2])
    sequences = sequence_arguments(len(q_THP), queries, keys.contexts)
    topk = 0 if selection_TK is None else selection_TK.shape[1]
    seen = (window or 0, sinks, address(selection_TK), topk)
    key_rows = min(len(k_NGP), len(v_NGV))
    kernels.run.attention(*_tensors(q_THP, k_NGP, v_NGV, out_THV, scale), sequences, key_rows, *seen)
    return out_THV


def accepts_tensors(
    q_STHP: Tensor, k_SNGP: Tensor, v_SNGV: Tensor, *, causal: bool, scale: float, window: int | None, sinks: int
) -> bool:
    """Formats that the kernels read; rows that are not dense are copied."""
    return q_STHP.dtype in DTYPES and scale > 0


@compiled(flash_forward, accepts_tensors)
def _flash_forward(
    kernels: Kernels,
    q_STHP: Tensor,
    k_SNGP: Tensor,
    v_SNGV: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    lengths = (q_STHP.shape[0], q_STHP.shape[1], k_SNGP.shape[1])
    rows_XHP, rows_YGP, rows_YGV = (_rows(x) for x in (q_STHP, k_SNGP, v_SNGV))
    out_STHV = q_STHP.new_empty(*q_STHP.shape[:3], v_SNGV.shape[3])
    lse_STH = q_STHP.new_empty(q_STHP.shape[:3], dtype=torch.float32)
    tensors = _tensors(rows_XHP, rows_YGP, rows_YGV, out_STHV, scale)
    kernels.run.flash_attention(*tensors, address(lse_STH), lengths, causal, window or 0, sinks)
    return out_STHV, lse_STH


def _rows(x_SNGP: Tensor) -> Tensor:
    """All sequences' rows [S N, G, P], with a last stride of 1; a view where it can be."""
    rows = x_SNGP.flatten(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _tensors(
    q_THP: Tensor, k_NGP: Tensor, v_NGV: Tensor, out: Tensor, scale: float
) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], int, tuple[int, ...], float, int, int]:
    """The arguments that both kernels begin with (csrc/bindings/flash.cpp)."""
    sizes = (*q_THP.shape[1:2], *k_NGP.shape[1:], v_NGV.shape[2])
    rows = _strided(q_THP), _strided(k_NGP), _strided(v_NGV)
    return *rows, out.data_ptr(), sizes, scale, FORMATS[q_THP.dtype], torch.get_num_threads()


def _strided(x_XYZ: Tensor) -> tuple[int, int, int]:
    """Address and strides of what has a last stride of 1."""
    return x_XYZ.data_ptr(), x_XYZ.stride(0), x_XYZ.stride(1)


def _check_shapes(q_THP: Tensor, k_NGP: Tensor, v_NGV: Tensor) -> None:
    shapes = f"q {tuple(q_THP.shape)}, keys {tuple(k_NGP.shape)}, values {tuple(v_NGV.shape)}"
    groups = k_NGP.shape[1]
    if k_NGP.shape[2] != q_THP.shape[2] or v_NGV.shape[1] != groups or not groups or q_THP.shape[1] % groups:
        raise ValueError(f"heads or dimensions do not match: {shapes}")
