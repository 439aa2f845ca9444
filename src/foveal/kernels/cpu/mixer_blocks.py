"""Residual blocks that mix tokens, x + mixer(norm(x)), as the compiled kernels take them (csrc/kernels/block.h)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.config.model import (
    GatedDeltaConfig,
    GQAConfig,
    IndexerConfig,
    KDAConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    RopeConfig,
)
from foveal.kernels.cpu.block_parts import (
    NO_LAYER,
    NO_PART,
    CachedRows,
    Layer,
    Norm,
    can_turn,
    layer_arguments,
    norm_arguments,
    pairs_of,
    readable,
)
from foveal.kernels.cpu.latent import check_widths
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address
from foveal.kernels.cpu.linear import takes_weight
from foveal.kernels.cpu.quantise import MOST_NUMBERS
from foveal.kernels.cpu.selection import stored_keys
from foveal.kernels.keys import Records, Rows
from foveal.kernels.records import IndexKeyRecords, LatentRecords

CacheParts = Sequence[Records | Tensor]
"""Keys and values, or latents, then index keys where the block has an indexer; or the tensors of recurrent states."""


@dataclass(frozen=True)
class IndexerPart:
    """The lightning indexer beside a mixer.

    weights: float32; key_norm: float32 weight and bias [J]; stored: what keys are kept as, a dtype, "fp8" or "int8".
    """

    config: IndexerConfig
    queries: Layer
    keys: Layer
    weights: Layer
    key_norm: tuple[Tensor, Tensor]
    stored: torch.dtype | str

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`; queries and keys are asked for by the block."""
        return (
            self.stored in (*DTYPES, "fp8", "int8")
            and self.config.head_dim <= MOST_NUMBERS
            and all(part.dtype == torch.float32 and part.is_contiguous() for part in self.key_norm)
            and takes_weight(self.weights.weight, torch.float32)
            and self.weights.bias is None
        )

    def cached(self, records: Records) -> tuple[tuple[int, int, int], int]:
        """Where its keys are, and how many rows there are; ValueError where they are not its own."""
        assert isinstance(records, Rows | IndexKeyRecords)
        data, kind, stride, count, size = stored_keys(records)
        stored = records.dtype if isinstance(records, IndexKeyRecords) else records.values.dtype
        if size != self.config.head_dim or stored != self.stored:
            wanted = f"{self.stored} index keys of {self.config.head_dim} numbers"
            raise ValueError(f"a cache of {stored} index keys of {size} numbers is not that of a block with {wanted}")
        return (address(data), stride, kind), count

    @property
    def arguments(self) -> tuple[Any, ...]:
        """`IndexerArguments` of csrc/bindings/block.cpp."""
        config = self.config
        return (
            *(layer_arguments(layer) for layer in (self.queries, self.keys, self.weights)),
            *(address(part) for part in self.key_norm),
            *(config.norm_eps, config.heads, config.head_dim, pairs_of(config.rope), config.rope.interleaved),
            *(config.heads**-0.5 * config.head_dim**-0.5, config.topk),
        )


_NO_INDEXER = (NO_LAYER, NO_LAYER, NO_LAYER, 0, 0, 0.0, 0, 0, 0, False, 0.0, 0)


@dataclass(frozen=True)
class GQABlock:
    """x + attention(norm(x)). heads: the norms of queries and keys, where there are any; sparse: see `MLABlock`."""

    config: GQAConfig
    norm: Norm
    qkv: Layer
    out: Layer
    heads: tuple[Norm, Norm] | None = None
    sparse: bool = False
    indexer: IndexerPart | None = None

    @property
    def ropes(self) -> tuple[RopeConfig | None, RopeConfig | None]:
        """Whose turns it needs: of queries and keys, and of an indexer."""
        return self.config.rope, self.indexer.config.rope if self.indexer else None

    @property
    def fusable(self) -> bool:
        """Whether the kernels can read its weights and compute what it asks for."""
        if self.config.gated or self.config.sinks or (self.sparse and self.config.window):
            return False
        layers = [self.qkv, self.out, *([self.indexer.queries, self.indexer.keys] if self.indexer else [])]
        indexer = self.indexer is None or self.indexer.fusable
        return indexer and can_turn(self.ropes) and readable([self.norm, *(self.heads or ())], layers)

    def native(self, kernels: Kernels) -> Any:
        """`GqaBlock` of csrc/kernels/block.h."""
        config, hidden = self.config, len(self.norm.weight_X)
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        assert self.qkv.weight.shape == (query + 2 * key, hidden) and self.out.weight.shape == (hidden, query)
        return kernels.run.GqaBlock(
            norm_arguments(self.norm),
            layer_arguments(self.qkv),
            layer_arguments(self.out),
            tuple(address(one.weight_X) for one in self.heads) if self.heads else (0, 0),
            (config.heads, config.kv_heads, config.head_dim),
            pairs_of(config.rope),
            bool(config.rope and config.rope.interleaved),
            config.scale,
            config.window or 0,
            self.sparse,
            self.indexer.arguments if self.indexer else _NO_INDEXER,
        )

    def cached(self, parts: CacheParts) -> CachedRows | None:
        """Keys and values [rows, G, P], and index keys; ValueError where they are not this block's."""
        keys, values, *index = parts
        row, dtype = (self.config.kv_heads, self.config.head_dim), self.norm.weight_X.dtype
        places = []
        for part in (keys, values):
            assert isinstance(part, Rows)
            rows = part.values
            if rows.shape[1:] != row or rows.dtype != dtype or not rows.is_contiguous():
                raise ValueError(f"{rows.dtype} {list(rows.shape)} is not the cache of a block with keys of {row}")
            places.append((address(rows), rows.stride(0) * rows.itemsize, FORMATS[dtype]))
        assert isinstance(keys, Rows) and isinstance(values, Rows)
        return _with_index(places, min(len(keys.values), len(values.values)), self.indexer, index)


@dataclass(frozen=True)
class MLABlock:
    """x + attention(norm(x)) in the absorbed form.

    q_a: the query latent's layer and norm, where there is one; up_XC: the weight [H (P + V), C] of keys and values;
    sparse: attends to a selection, its indexer's or an earlier block's.
    """

    config: MLAConfig
    norm: Norm
    q_a: tuple[Layer, Norm] | None
    q: Layer
    kv_a: tuple[Layer, Norm]
    up_XC: Tensor
    out: Layer
    sparse: bool
    indexer: IndexerPart | None

    @property
    def ropes(self) -> tuple[RopeConfig | None, RopeConfig | None]:
        """See `GQABlock.ropes`."""
        return self.config.rope, self.indexer.config.rope if self.indexer else None

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        norms, layers = [self.norm, self.kv_a[1]], [self.q, self.kv_a[0], self.out, Layer(self.up_XC)]
        if self.q_a:
            layers.append(self.q_a[0])
            norms.append(self.q_a[1])
        if self.indexer:
            layers += self.indexer.queries, self.indexer.keys
        indexer = self.indexer is None or self.indexer.fusable
        return indexer and can_turn(self.ropes) and readable(norms, layers)

    def native(self, kernels: Kernels) -> Any:
        """`MlaBlock` of csrc/kernels/block.h."""
        config = self.config
        q_a, q_a_norm = self.q_a or (None, None)
        kv_a, kv_a_norm = self.kv_a
        return kernels.run.MlaBlock(
            norm_arguments(self.norm),
            [layer_arguments(layer) for layer in (q_a, self.q, kv_a, self.out)],
            [address(q_a_norm.weight_X if q_a_norm else None), address(kv_a_norm.weight_X), address(self.up_XC)],
            kv_a_norm.eps,
            config.heads,
            [config.nope_dim, config.rope_dim, config.value_dim, config.kv_lora_rank],
            config.rope is not None,
            bool(config.rope and config.rope.interleaved),
            config.scale,
            self.sparse,
            self.indexer.arguments if self.indexer else _NO_INDEXER,
        )

    def cached(self, parts: CacheParts) -> CachedRows | None:
        """Latents and index keys; None where they are kept as something that the kernels do not read for this dtype.
        ValueError where they are not this block's."""
        latents, *index = parts
        config = self.config
        if isinstance(latents, LatentRecords):
            rows, kind = latents.bytes_, FORMATS[torch.float8_e4m3fn]
        elif isinstance(latents, Rows) and latents.values.dtype == self.norm.weight_X.dtype:
            rows, kind = latents.values, FORMATS[latents.values.dtype]
        else:
            return None
        check_widths(config.kv_lora_rank + config.rope_dim, config.kv_lora_rank, rows)
        of_latents = address(rows), rows.stride(0) * rows.itemsize, kind
        return _with_index([of_latents, NO_PART], len(rows), self.indexer, index)


@dataclass(frozen=True)
class ConvPart:
    """The short convolution before a recurrence: weight [X, 1, W], bias [X] or none; then `activation`."""

    weight_X1W: Tensor
    bias_X: Tensor | None
    activation: str

    def fusable(self, dtype: torch.dtype) -> bool:
        """See `GQABlock.fusable`."""
        tensors = [self.weight_X1W] if self.bias_X is None else [self.weight_X1W, self.bias_X]
        return self.activation == "silu" and all(x.dtype == dtype and x.is_contiguous() for x in tensors)

    @property
    def arguments(self) -> tuple[int, int, int]:
        """`ConvArguments` of csrc/bindings/block.cpp."""
        return self.weight_X1W.shape[2], address(self.weight_X1W), address(self.bias_X)


class _RecurrentBlock:
    """A block that keeps a state for each sequence instead of something for each token."""

    config: MambaConfig | Mamba2Config | GatedDeltaConfig | KDAConfig
    norm: Norm

    @property
    def ropes(self) -> tuple[None, None]:
        """See `GQABlock.ropes`."""
        return None, None

    def cached(self, parts: CacheParts) -> CachedRows:
        """The convolution's inputs [slots, W - 1, X] and the states [slots, ...]; ValueError where they are not this
        block's."""
        wanted = [(self.config.inputs_shape, self.norm.weight_X.dtype), (self.config.state_shape, torch.float32)]
        places = []
        for (shape, dtype), values in zip(wanted, parts, strict=True):
            assert isinstance(values, Tensor)
            if values.shape[1:] != shape or values.dtype != dtype or not values.is_contiguous():
                raise ValueError(f"{values.dtype} {list(values.shape)} is not the state of a block with {list(shape)}")
            places.append((address(values), values.stride(0) * values.itemsize, FORMATS[dtype]))
        return CachedRows([*places, NO_PART], min(len(values) for values in parts if isinstance(values, Tensor)))


@dataclass(frozen=True)
class MambaBlock(_RecurrentBlock):
    """Mamba-1.

    projections: in, x, dt, out; a_XY: float32, negative; d_X: float32; norms: of dt, B and C, where there are any.
    """

    config: MambaConfig
    norm: Norm
    projections: tuple[Layer, Layer, Layer, Layer]
    conv: ConvPart
    a_XY: Tensor
    d_X: Tensor
    norms: tuple[Norm, Norm, Norm] | None

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        return (
            self.conv.fusable(self.norm.weight_X.dtype)
            and readable([self.norm, *(self.norms or ())], list(self.projections))
            and all(x.dtype == torch.float32 and x.is_contiguous() for x in (self.a_XY, self.d_X))
        )

    def native(self, kernels: Kernels) -> Any:
        """`MambaBlock` of csrc/kernels/block.h."""
        config = self.config
        return kernels.run.MambaBlock(
            norm_arguments(self.norm),
            [layer_arguments(layer) for layer in self.projections],
            self.conv.arguments,
            [address(self.a_XY), address(self.d_X)],
            [address(norm.weight_X) for norm in self.norms] if self.norms else [0, 0, 0],
            [config.inner, config.state, config.dt_rank],
        )


@dataclass(frozen=True)
class Mamba2Block(_RecurrentBlock):
    """Mamba-2. a_H: float32, negative; d_H, dt_bias_H: float32; out_norm: of each group for itself."""

    config: Mamba2Config
    norm: Norm
    projections: tuple[Layer, Layer]
    conv: ConvPart
    a_H: Tensor
    d_H: Tensor
    dt_bias_H: Tensor
    out_norm: Norm

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        return (
            self.conv.fusable(self.norm.weight_X.dtype)
            and readable([self.norm, self.out_norm], list(self.projections))
            and all(x.dtype == torch.float32 and x.is_contiguous() for x in (self.a_H, self.d_H, self.dt_bias_H))
        )

    def native(self, kernels: Kernels) -> Any:
        """`Mamba2Block` of csrc/kernels/block.h."""
        config = self.config
        into, out = self.projections
        return kernels.run.Mamba2Block(
            norm_arguments(self.norm),
            layer_arguments(into),
            layer_arguments(out),
            self.conv.arguments,
            [address(self.a_H), address(self.d_H), address(self.dt_bias_H)],
            list(config.dt_limits or (0.0, math.inf)),
            address(self.out_norm.weight_X),
            [config.heads, config.head_dim, config.state, config.groups],
        )


@dataclass(frozen=True)
class DeltaBlock(_RecurrentBlock):
    """The gated delta rule, or KDA.

    projections: in, b and a, out; gates: of KDA, f_a, f_b, g_a and g_b; a_H: float32, negative; dt_bias_X: float32;
    out_norm: of each head.
    """

    config: GatedDeltaConfig | KDAConfig
    norm: Norm
    projections: tuple[Layer, Layer, Layer]
    gates: tuple[Layer, Layer, Layer, Layer] | None
    conv: ConvPart
    a_H: Tensor
    dt_bias_X: Tensor
    out_norm: Norm

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        return (
            self.conv.fusable(self.norm.weight_X.dtype)
            and readable([self.norm, self.out_norm], [*self.projections, *(self.gates or ())])
            and all(x.dtype == torch.float32 and x.is_contiguous() for x in (self.a_H, self.dt_bias_X))
        )

    def native(self, kernels: Kernels) -> Any:
        """`DeltaBlock` of csrc/kernels/block.h."""
        config = self.config
        if isinstance(config, KDAConfig):
            sizes = [config.heads, config.heads, config.head_dim, config.head_dim]
        else:
            sizes = [config.heads, config.key_heads, config.key_dim, config.value_dim]
        into, ba, out = self.projections
        return kernels.run.DeltaBlock(
            norm_arguments(self.norm),
            [layer_arguments(layer) for layer in (into, ba, *(self.gates or (None,) * 4), out)],
            self.conv.arguments,
            [address(self.a_H), address(self.dt_bias_X), address(self.out_norm.weight_X)],
            sizes,
        )


def _with_index(
    places: list[tuple[int, int, int]], rows: int, indexer: IndexerPart | None, index: Sequence[Records | Tensor]
) -> CachedRows:
    """What a block keeps, and its index keys where it has an indexer."""
    if indexer is None:
        return CachedRows([*places, NO_PART], rows)
    (records,) = index
    assert not isinstance(records, Tensor)
    place, count = indexer.cached(records)
    return CachedRows([*places, place], min(rows, count))
