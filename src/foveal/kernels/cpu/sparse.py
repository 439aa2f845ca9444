"""Attention over a selection: absorbed MLA (csrc/kernels/latent.cpp) and grouped queries (csrc/kernels/sparse.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.cpu import latent
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, compiled
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.keys import KeySource, Queries, Rows
from foveal.kernels.sparse import check_selection_shape, sparse_attention


def _accepts(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> bool:
    if selection_TK.dtype != torch.int32:
        return False
    return latent.serves(q_THP, latent.latent_rows(keys, values)) or _serves_groups(q_THP, keys, values)


def _serves_groups(q_THP: Tensor, keys: KeySource, values: KeySource) -> bool:
    """Whether these are keys and values by head, in the queries' dtype, that the kernel can read."""
    if values.contexts is not keys.contexts or q_THP.dtype not in DTYPES:
        return False
    for source in (keys, values):
        if not isinstance(source.records, Rows):
            return False
        rows_RGP = source.records.values
        if rows_RGP.dim() != 3 or rows_RGP.dtype != q_THP.dtype or not rows_RGP.is_contiguous():
            return False
        if rows_RGP.requires_grad and torch.is_grad_enabled():
            return False
    return True


@compiled(sparse_attention, _accepts)
def _sparse_attention(
    kernels: Kernels,
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    selection_TK: Tensor,
    queries: Queries,
    *,
    scale: float,
) -> Tensor:
    check_selection_shape(selection_TK, q_THP.shape[0])
    selection_TK = selection_TK.contiguous()
    if latent.latent_rows(keys, values):
        return latent.run(kernels, q_THP, keys, values, selection_TK, queries, scale)
    return _grouped(kernels, q_THP.contiguous(), keys, values, selection_TK, queries, scale)


def _grouped(
    kernels: Kernels,
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    selection_TK: Tensor,
    queries: Queries,
    scale: float,
) -> Tensor:
    assert isinstance(keys.records, Rows) and isinstance(values.records, Rows)
    k_RGP, v_RGV = keys.records.values, values.records.values
    tokens, heads, width = q_THP.shape
    rows, groups, value_width = v_RGV.shape
    if k_RGP.shape != (rows, groups, width) or heads % groups:
        shapes = f"q {tuple(q_THP.shape)}, keys {tuple(k_RGP.shape)}, values {tuple(v_RGV.shape)}"
        raise ValueError(f"shapes that do not belong together: {shapes}")
    out_THV = torch.empty(tokens, heads, value_width, dtype=q_THP.dtype)
    kernels.run.sparse_attention(
        *(address(q_THP), address(k_RGP), address(v_RGV), address(out_THV), FORMATS[q_THP.dtype]),
        *(rows, heads, groups, width, value_width, scale),
        *sequence_arguments(tokens, queries, keys.contexts),
        *(address(selection_TK), selection_TK.shape[1], torch.get_num_threads()),
    )
    return out_THV
