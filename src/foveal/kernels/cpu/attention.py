"""Dense attention: heads in groups (csrc/kernels/flash.cpp) and absorbed MLA (csrc/kernels/latent.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.cpu.latent import accepts_latent, latent_attention
from foveal.kernels.cpu.library import FORMATS, Kernels, address, compiled
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.dense import attention
from foveal.kernels.keys import KeySource, OneHead, Queries, Rows

_DTYPES = (torch.float32, torch.bfloat16)


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
        and q_THP.dtype in _DTYPES
        and all(x.dtype == q_THP.dtype and x.dim() == 3 and x.stride(2) == 1 for x in tensors)
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
        return plain and accepts_latent(q_THP, keys, values, queries, scale=scale)
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
        return latent_attention(kernels, q_THP, keys, values, queries, scale=scale)
    assert isinstance(keys.records, Rows) and isinstance(values.records, Rows)
    k_NGP, v_NGV = keys.records.values, values.records.values
    _check_shapes(q_THP, k_NGP, v_NGV, queries)
    if sinks < 0:
        raise ValueError(f"sinks must not be negative, not {sinks}")
    if selection_TK is not None:
        _check_selection(selection_TK, len(q_THP))
    out_THV = q_THP.new_empty(*q_THP.shape[:2], v_NGV.shape[2])
    sizes = (q_THP.shape[1], k_NGP.shape[1], k_NGP.shape[2], v_NGV.shape[2])
    kernels.run.flash(
        *(_strided(x) for x in (q_THP, k_NGP, v_NGV)),
        address(out_THV),
        0,
        sequence_arguments(queries, keys.contexts),
        min(len(k_NGP), len(v_NGV)),
        sizes,
        scale,
        True,
        window or 0,
        sinks,
        address(selection_TK),
        0 if selection_TK is None else selection_TK.shape[1],
        FORMATS[q_THP.dtype],
        torch.get_num_threads(),
    )
    return out_THV


def _strided(x_XYZ: Tensor) -> tuple[int, int, int]:
    """Address and strides of what has a last stride of 1."""
    return x_XYZ.data_ptr(), x_XYZ.stride(0), x_XYZ.stride(1)


def _check_shapes(q_THP: Tensor, k_NGP: Tensor, v_NGV: Tensor, queries: Queries) -> None:
    shapes = f"q {tuple(q_THP.shape)}, keys {tuple(k_NGP.shape)}, values {tuple(v_NGV.shape)}"
    if k_NGP.shape[2] != q_THP.shape[2] or v_NGV.shape[1] != k_NGP.shape[1] or q_THP.shape[1] % k_NGP.shape[1]:
        raise ValueError(f"heads or dimensions do not match: {shapes}")
    if queries.offsets[-1] != len(q_THP):
        raise ValueError(f"{queries.offsets[-1]} queries, but {shapes}")


def _check_selection(selection_TK: Tensor, count: int) -> None:
    if selection_TK.dtype != torch.int32 or selection_TK.dim() != 2 or len(selection_TK) != count:
        raise ValueError(f"selection is {selection_TK.dtype} {tuple(selection_TK.shape)}, not int32 [{count}, K]")
    if not selection_TK.is_contiguous():
        raise ValueError(f"selection has strides {selection_TK.stride()}, so it is not contiguous")
