"""Dense attention (csrc/kernels/latent.cpp): absorbed MLA."""

from torch import Tensor

from foveal.kernels.cpu.latent import accepts_latent, latent_attention
from foveal.kernels.cpu.library import Kernels, compiled
from foveal.kernels.dense import attention
from foveal.kernels.keys import KeySource, Queries


@compiled(attention, accepts_latent)
def _attention(
    kernels: Kernels,
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    scale: float,
    window: int | None = None,
    selection_TK: Tensor | None = None,
) -> Tensor:
    return latent_attention(
        kernels, q_THP, keys, values, queries, scale=scale, window=window, selection_TK=selection_TK
    )
