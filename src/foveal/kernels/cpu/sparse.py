"""Attention over a selection (csrc/kernels/latent.cpp)."""

import torch
from torch import Tensor

from foveal.kernels.cpu import latent
from foveal.kernels.cpu.library import Kernels, compiled
from foveal.kernels.keys import KeySource, Queries
from foveal.kernels.sparse import sparse_attention


def _accepts(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> bool:
    return selection_TK.dtype == torch.int32 and latent.serves(q_THP, latent.latent_rows(keys, values))


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
    if selection_TK.dim() != 2 or selection_TK.shape[0] != q_THP.shape[0]:
        raise ValueError(f"selection has shape {tuple(selection_TK.shape)} for {q_THP.shape[0]} queries")
    return latent.run(kernels, q_THP, keys, values, selection_TK.contiguous(), queries, scale)
