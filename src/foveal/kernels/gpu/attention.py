"""The Triton versions of the attentions: what they accept, and which kernel serves it."""

import torch
from torch import Tensor

from foveal.config.formats import latent_bytes
from foveal.kernels.dense import attention
from foveal.kernels.flash import flash_forward
from foveal.kernels.gpu.library import triton_version
from foveal.kernels.gpu.stored import latents_of
from foveal.kernels.keys import KeySource, OneHead, Queries, Rows
from foveal.kernels.packed import learns  # its versions, for gradients, come before these
from foveal.kernels.sparse import check_selection_shape, sparse_attention

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A tile's results stay in registers: wider values than these would not.
_MOST_NUMBERS = 512
_MOST_SELECTED = 1 << 14


def accepts_latent(q_THP: Tensor, keys: KeySource, values: KeySource) -> bool:
    """Absorbed MLA over plain latents in the queries' dtype, or over fp8 records whose parts are aligned."""
    latents = latents_of(keys, values)
    if latents is None or q_THP.dtype not in _DTYPES or latents.dtype != q_THP.dtype or latents.rank > _MOST_NUMBERS:
        return False
    rope_dim = q_THP.shape[2] - latents.rank
    if latents.fp8:
        aligned = latents.rank % 4 == 0 and rope_dim >= 0 and latent_bytes(latents.rank, rope_dim, "fp8") % 4 == 0
        return aligned and latents.rows.storage_offset() % 4 == 0
    return not learns(q_THP, keys, values)


def accepts_grouped(q_THP: Tensor, keys: KeySource, values: KeySource) -> bool:
    """Plain rows of keys and values at the same places, in the queries' dtype."""
    if (
        not (isinstance(keys.records, Rows) and isinstance(values.records, Rows))
        or keys.contexts is not values.contexts
    ):
        return False
    k_RGP, v_RGV = keys.records.values, values.records.values
    if learns(q_THP, keys, values):
        return False
    same = all(x.dim() == 3 and x.dtype == q_THP.dtype for x in (q_THP, k_RGP, v_RGV))
    return same and q_THP.dtype in _DTYPES and max(k_RGP.shape[2], v_RGV.shape[2]) <= _MOST_NUMBERS


def _accepts_sparse(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> bool:
    if selection_TK.dtype != torch.int32:
        return False
    if isinstance(keys.records, OneHead):
        few = selection_TK.dim() == 2 and selection_TK.shape[1] <= _MOST_SELECTED
        return few and accepts_latent(q_THP, keys, values)
    return accepts_grouped(q_THP, keys, values)


@triton_version(sparse_attention, _accepts_sparse)
def sparse(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, *, scale: float
) -> Tensor:
    """`sparse_attention`: absorbed MLA, or grouped heads. Entries that are no position of the sequence count as -1."""
    check_selection_shape(selection_TK, len(q_THP))
    if isinstance(keys.records, OneHead):
        from foveal.kernels.gpu.latent import latent_attention

        return latent_attention(q_THP, keys, values, selection_TK, queries, scale=scale).run().out_THV
    from foveal.kernels.gpu.flash import selected_attention

    return selected_attention(q_THP, keys, values, selection_TK, queries, scale=scale).run().out_THV


def _accepts_dense(
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
    if selection_TK is not None or scale <= 0:
        return False
    if isinstance(keys.records, OneHead):
        return window is None and sinks == 0 and accepts_latent(q_THP, keys, values)
    return accepts_grouped(q_THP, keys, values)


@triton_version(attention, _accepts_dense)
def dense(
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
    """`attention`: absorbed MLA, or grouped heads with windows and sinks. The masked form is left to torch."""
    assert selection_TK is None
    if isinstance(keys.records, OneHead):
        from foveal.kernels.gpu.latent import latent_attention

        return latent_attention(q_THP, keys, values, None, queries, scale=scale).run().out_THV
    from foveal.kernels.gpu.flash import Seen, packed_attention

    if sinks < 0:
        raise ValueError(f"sinks must not be negative, not {sinks}")
    seen = Seen(True, window or None, sinks)
    return packed_attention(q_THP, keys, values, queries, scale=scale, seen=seen).run().out_THV


def _accepts_tensors(
    q_STHP: Tensor, k_SNGP: Tensor, v_SNGV: Tensor, *, causal: bool, scale: float, window: int | None, sinks: int
) -> bool:
    widest = max(k_SNGP.shape[3], v_SNGV.shape[3])
    return q_STHP.dtype in _DTYPES and scale > 0 and widest <= _MOST_NUMBERS and k_SNGP.shape[1] > 0


@triton_version(flash_forward, _accepts_tensors)
def flash(
    q_STHP: Tensor, k_SNGP: Tensor, v_SNGV: Tensor, *, causal: bool, scale: float, window: int | None, sinks: int
) -> tuple[Tensor, Tensor]:
    """`flash_forward`."""
    from foveal.kernels.gpu.flash import Seen, plain_attention

    work = plain_attention(q_STHP, k_SNGP, v_SNGV, scale=scale, seen=Seen(causal, window, sinks)).run()
    shape = q_STHP.shape[:3]
    return work.out_THV.view(*shape, -1), work.lse_TH.view(shape)
