"""Operations on tensors: each has a naive `reference`, faster versions, and one public function that picks."""

from typing import Any

from foveal.kernels import cpu as _cpu
from foveal.kernels import gpu as _gpu
from foveal.kernels import packed as _packed
from foveal.kernels.activation import gated
from foveal.kernels.delta import delta_rule, linear_attention
from foveal.kernels.dense import attention
from foveal.kernels.dispatch import Operation
from foveal.kernels.divergence import index_divergence
from foveal.kernels.flash import flash_attention, flash_forward
from foveal.kernels.keys import Columns, Contexts, KeySource, OneHead, Queries, Rows
from foveal.kernels.large_pages import settle
from foveal.kernels.matmul import QUANTIZATIONS, QuantisedWeight, linear, pack_weight, quantise_weight
from foveal.kernels.moe import experts
from foveal.kernels.norm import add_rms_norm, rms_norm
from foveal.kernels.packed import sparse_gradients
from foveal.kernels.quantise import hadamard, quantise_e4m3, quantise_index
from foveal.kernels.records import write_index_keys, write_latents
from foveal.kernels.rope import apply_rope
from foveal.kernels.s4d import s4d
from foveal.kernels.scan import causal_conv, selective_scan
from foveal.kernels.selection import select
from foveal.kernels.sparse import sparse_attention
from foveal.kernels.ssd import ssd

__all__ = [
    "QUANTIZATIONS",
    "Columns",
    "Contexts",
    "KeySource",
    "OneHead",
    "Operation",
    "QuantisedWeight",
    "Queries",
    "Rows",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "causal_conv",
    "delta_rule",
    "experts",
    "flash_attention",
    "gated",
    "hadamard",
    "index_divergence",
    "linear",
    "linear_attention",
    "operations",
    "pack_weight",
    "quantise_e4m3",
    "quantise_index",
    "quantise_weight",
    "rms_norm",
    "s4d",
    "select",
    "selective_scan",
    "settle",
    "sparse_attention",
    "sparse_gradients",
    "ssd",
    "write_index_keys",
    "write_latents",
]


del _cpu, _gpu, _packed  # importing them registered the fast versions, and those for training


def operations() -> tuple[Operation[..., Any], ...]:
    """Every operation that has versions to choose from."""
    attentions = (attention, flash_forward, sparse_attention)
    recurrences = (causal_conv, s4d, selective_scan, ssd, linear_attention, delta_rule)
    products = (linear, *attentions, select, experts, *recurrences)
    stores = (quantise_index, write_index_keys, write_latents)
    return (index_divergence, sparse_gradients, *products, *stores, rms_norm, add_rms_norm, apply_rope, gated)
