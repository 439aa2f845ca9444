"""Residual blocks, x + operation(norm(x)), as the compiled kernels take them: weights and sizes (csrc/kernels/block.h).

Addresses of weights are kept: a weight that is replaced afterwards is not noticed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.config.model import GQAConfig, IndexerConfig, MLAConfig, MoEConfig, RopeConfig
from foveal.kernels.cpu.activation import COMPILED
from foveal.kernels.cpu.latent import check_widths
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address
from foveal.kernels.cpu.linear import takes_weight, weight_arguments
from foveal.kernels.cpu.quantise import MOST_NUMBERS
from foveal.kernels.cpu.rope import MOST_PAIRS
from foveal.kernels.cpu.selection import stored_keys
from foveal.kernels.keys import Records, Rows
from foveal.kernels.matmul import QuantisedWeight, Weight
from foveal.kernels.records import IndexKeyRecords, LatentRecords

CacheParts = tuple[Records, Records | None]
"""Keys and values, or latents and index keys where the block has an indexer."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: weight [X] and epsilon."""

    weight_X: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight [out, in], bias [out] or none."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True)
class CachedRows:
    """A cache as addresses, for as long as its tensors live."""

    arguments: tuple[int, int, int, int, int, int]
    """Of each part, where it begins, bytes from one row (or page) to the next, and its format."""
    rows: int


@dataclass(frozen=True)
class GQABlock:
    """x + attention(norm(x)). heads: the norms of queries and keys, where there are any."""

    config: GQAConfig
    norm: Norm
    qkv: Layer
    out: Layer
    heads: tuple[Norm, Norm] | None = None

    @property
    def ropes(self) -> tuple[RopeConfig | None, RopeConfig | None]:
        """Whose turns it needs: of queries and keys, and of an indexer."""
        return self.config.rope, None

    @property
    def fusable(self) -> bool:
        """Whether the kernels can read its weights and compute what it asks for."""
        if self.config.gated or self.config.sinks:
            return False
        return _turns(self.ropes) and _readable([self.norm, *(self.heads or ())], [self.qkv, self.out])

    def native(self, kernels: Kernels) -> Any:
        """`GqaBlock` of csrc/kernels/block.h."""
        config, hidden = self.config, len(self.norm.weight_X)
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        assert self.qkv.weight.shape == (query + 2 * key, hidden) and self.out.weight.shape == (hidden, query)
        return kernels.run.GqaBlock(
            _norm_arguments(self.norm),
            _layer_arguments(self.qkv),
            _layer_arguments(self.out),
            tuple(address(one.weight_X) for one in self.heads) if self.heads else (0, 0),
            (config.heads, config.kv_heads, config.head_dim),
            pairs_of(config.rope),
            bool(config.rope and config.rope.interleaved),
            config.scale,
            config.window or 0,
        )

    def cached(self, parts: CacheParts) -> CachedRows | None:
        """Keys and values [rows, G, P]; ValueError where they are not this block's."""
        row, dtype = (self.config.kv_heads, self.config.head_dim), self.norm.weight_X.dtype
        places: list[int] = []
        counts = []
        for part in parts:
            assert isinstance(part, Rows)
            values = part.values
            if values.shape[1:] != row or values.dtype != dtype or not values.is_contiguous():
                raise ValueError(f"{values.dtype} {list(values.shape)} is not the cache of a block with keys of {row}")
            places += address(values), values.stride(0) * values.itemsize, FORMATS[dtype]
            counts.append(len(values))
        return CachedRows((*places[:3], *places[3:]), min(counts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class MLPBlock:
    """x + down(act(gate(norm(x))) * up(norm(x)))."""

    norm: Norm
    gate_up: Layer
    down: Layer
    activation: str

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        return self.activation in COMPILED and _readable([self.norm], [self.gate_up, self.down])

    def native(self, kernels: Kernels) -> Any:
        """`MlpBlock` of csrc/kernels/block.h."""
        hidden, inner = self.down.weight.shape
        assert self.gate_up.weight.shape == (2 * inner, hidden) and hidden == len(self.norm.weight_X)
        return kernels.run.MlpBlock(
            _norm_arguments(self.norm),
            _layer_arguments(self.gate_up),
            _layer_arguments(self.down),
            COMPILED[self.activation],
        )


@dataclass(frozen=True)
class IndexerPart:
    """The lightning indexer beside latent attention.

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

    @property
    def arguments(self) -> tuple[Any, ...]:
        """`IndexerArguments` of csrc/bindings/block.cpp."""
        config = self.config
        return (
            *(_layer_arguments(layer) for layer in (self.queries, self.keys, self.weights)),
            *(address(part) for part in self.key_norm),
            *(config.norm_eps, config.heads, config.head_dim, pairs_of(config.rope), config.rope.interleaved),
            *(config.heads**-0.5 * config.head_dim**-0.5, config.topk),
        )


_NO_LAYER = (0,) * 8
_NO_INDEXER = (_NO_LAYER, _NO_LAYER, _NO_LAYER, 0, 0, 0.0, 0, 0, 0, False, 0.0, 0)


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
        return indexer and _turns(self.ropes) and _readable(norms, layers)

    def native(self, kernels: Kernels) -> Any:
        """`MlaBlock` of csrc/kernels/block.h."""
        config = self.config
        q_a, q_a_norm = self.q_a or (None, None)
        kv_a, kv_a_norm = self.kv_a
        return kernels.run.MlaBlock(
            _norm_arguments(self.norm),
            [_layer_arguments(layer) for layer in (q_a, self.q, kv_a, self.out)],
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
        latents, index = parts
        config = self.config
        if isinstance(latents, LatentRecords):
            rows, kind = latents.bytes_, FORMATS[torch.float8_e4m3fn]
        elif isinstance(latents, Rows) and latents.values.dtype == self.norm.weight_X.dtype:
            rows, kind = latents.values, FORMATS[latents.values.dtype]
        else:
            return None
        check_widths(config.kv_lora_rank + config.rope_dim, config.kv_lora_rank, rows)
        of_latents = address(rows), rows.stride(0) * rows.itemsize, kind
        if self.indexer is None:
            return CachedRows((*of_latents, 0, 0, 0), len(rows))
        assert isinstance(index, Rows | IndexKeyRecords)
        data, index_kind, stride, count, size = stored_keys(index)
        stored = index.dtype if isinstance(index, IndexKeyRecords) else index.values.dtype
        if size != self.indexer.config.head_dim or stored != self.indexer.stored:
            wanted = f"{self.indexer.stored} index keys of {self.indexer.config.head_dim} numbers"
            raise ValueError(f"a cache of {stored} index keys of {size} numbers is not that of a block with {wanted}")
        return CachedRows((*of_latents, address(data), stride, index_kind), min(len(rows), count))


@dataclass(frozen=True)
class MoEBlock:
    """x + experts(norm(x)).

    router: [E, D]; bias_E: float32, for choosing only; gate_up, down: the stacked weights; shared: gate and up, and
    down, of the expert for all tokens; shared_gate: [1, D], what it is multiplied by.
    """

    config: MoEConfig
    norm: Norm
    router: Layer
    bias_E: Tensor | None
    gate_up: Tensor | QuantisedWeight
    down: Tensor | QuantisedWeight
    shared: tuple[Layer, Layer] | None
    shared_gate: Layer | None

    @property
    def fusable(self) -> bool:
        """See `GQABlock.fusable`."""
        dtype = self.norm.weight_X.dtype
        stacks = type(self.gate_up) is type(self.down) and all(
            takes_weight(stack, dtype, 3) for stack in (self.gate_up, self.down)
        )
        bias = self.bias_E is None or (self.bias_E.dtype == torch.float32 and self.bias_E.is_contiguous())
        layers = [self.router, *(self.shared or ()), *([self.shared_gate] if self.shared_gate else [])]
        return self.config.activation == "silu" and stacks and bias and _readable([self.norm], layers)

    def native(self, kernels: Kernels) -> Any:
        """`MoeBlock` of csrc/kernels/block.h."""
        config, router = self.config, self.config.router
        shared_gate_up, shared_down = self.shared or (None, None)
        return kernels.run.MoeBlock(
            _norm_arguments(self.norm),
            (
                *(weight_arguments(self.router.weight), address(self.bias_E), router.scoring == "sigmoid"),
                *(router.normalise, router.scale, router.groups, router.groups_kept),
                *(router.group_score == "top2", router.masked_score),
            ),
            weight_arguments(self.gate_up),
            weight_arguments(self.down),
            config.experts,
            config.per_token,
            [_layer_arguments(layer) for layer in (shared_gate_up, shared_down, self.shared_gate)],
        )


AnyBlock = GQABlock | MLABlock | MLPBlock | MoEBlock


def pairs_of(rope: RopeConfig | None) -> int:
    """Pairs that a rope turns."""
    return rope.dim // 2 if rope else 0


def _turns(ropes: Sequence[RopeConfig | None]) -> bool:
    return all(pairs_of(rope) <= MOST_PAIRS for rope in ropes)


def _readable(norms: list[Norm], layers: list[Layer]) -> bool:
    """Whether everything is of one supported dtype, on the CPU and laid out as the kernels read it."""
    dtype = norms[0].weight_X.dtype
    vectors = [one.weight_X for one in norms] + [layer.bias for layer in layers if layer.bias is not None]
    return (
        dtype in DTYPES
        and all(v.dtype == dtype and v.device.type == "cpu" and v.is_contiguous() for v in vectors)
        and all(takes_weight(layer.weight, dtype) for layer in layers)
    )


def _norm_arguments(norm: Norm) -> tuple[int, int, float, int]:
    return address(norm.weight_X), norm.weight_X.shape[0], norm.eps, FORMATS[norm.weight_X.dtype]


def _layer_arguments(layer: Layer | None) -> tuple[int, ...]:
    return (*weight_arguments(layer.weight), address(layer.bias)) if layer else _NO_LAYER
