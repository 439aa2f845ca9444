"""Whole residual blocks, x + operation(norm(x)), one after another in one call (csrc/kernels/block.cpp).

Made once from the blocks' weights, whose addresses are kept: a weight that is replaced afterwards is not noticed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.config.model import GQAConfig
from foveal.kernels.cpu.activation import COMPILED
from foveal.kernels.cpu.library import DTYPES, FORMATS, Kernels, address, instruction_sets
from foveal.kernels.cpu.linear import takes_weight, weight_arguments
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.cpu.rope import MOST_PAIRS
from foveal.kernels.keys import Contexts, Queries
from foveal.kernels.matmul import Weight


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
class GQABlock:
    """x + attention(norm(x)). heads: the norms of queries and keys, where there are any."""

    config: GQAConfig
    norm: Norm
    qkv: Layer
    out: Layer
    heads: tuple[Norm, Norm] | None = None

    @property
    def pairs(self) -> int:
        """Pairs that rope turns."""
        return self.config.rope.dim // 2 if self.config.rope else 0

    @property
    def fusable(self) -> bool:
        """Whether the kernels can read its weights and compute what it asks for."""
        if self.config.gated or self.config.sinks:
            return False
        return self.pairs <= MOST_PAIRS and _readable([self.norm, *(self.heads or ())], [self.qkv, self.out])

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
            self.pairs,
            bool(config.rope and config.rope.interleaved),
            config.scale,
            config.window or 0,
        )


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


AnyBlock = GQABlock | MLPBlock


@dataclass(frozen=True)
class KeyPlaces:
    """Where the attention blocks' keys and values are: checked addresses, for as long as their tensors live."""

    addresses: list[tuple[int, int]]
    rows: int


class BlockRun:
    """Blocks that follow one another, all fusable and of one dtype."""

    def __init__(self, kernels: Kernels, blocks: Sequence[AnyBlock]) -> None:
        assert blocks and all(block.fusable for block in blocks)
        self._blocks = list(blocks)  # keeps the weights alive
        self._attention = [block for block in blocks if isinstance(block, GQABlock)]
        self._like_1D = blocks[0].norm.weight_X[None]
        assert all(block.norm.weight_X.dtype == self._like_1D.dtype for block in blocks)
        self._run = kernels.run.run_blocks
        self._native = kernels.run.Blocks([block.native(kernels) for block in blocks])

    def places(self, caches: Sequence[tuple[Tensor, Tensor]]) -> KeyPlaces:
        """Keys and values [rows, G, P] of each attention block in order. ValueError where they do not fit."""
        for block, parts in zip(self._attention, caches, strict=True):
            row = (block.config.kv_heads, block.config.head_dim)
            for part in parts:
                if part.shape[1:] != row or part.dtype != self._like_1D.dtype or not part.is_contiguous():
                    raise ValueError(f"{part.dtype} {list(part.shape)} is not the cache of a block with keys of {row}")
        rows = min((len(part) for parts in caches for part in parts), default=0)
        return KeyPlaces([(address(keys), address(values)) for keys, values in caches], rows)

    def __call__(
        self,
        x_TD: Tensor,
        turns: Sequence[Tensor | None],
        places: KeyPlaces,
        rows_T: Tensor,
        queries: Queries,
        contexts: Contexts,
    ) -> Tensor:
        """[T, D] -> [T, D].

        turns: of each attention block, see `apply_rope`; None without rope. rows_T: int64 cache rows of the tokens' own
        keys, which are written. ValueError where anything does not fit, or a row or page is not in the cache.
        """
        tokens, hidden = x_TD.shape
        like_1D = self._like_1D
        if hidden != like_1D.shape[1] or x_TD.dtype != like_1D.dtype or not x_TD.is_contiguous():
            raise ValueError(
                f"x is {x_TD.dtype} {list(x_TD.shape)}, the blocks take {like_1D.dtype} [T, {like_1D.shape[1]}]"
            )
        if len(rows_T) != tokens:
            raise ValueError(f"{tokens} tokens, but {len(rows_T)} rows to keep them at")
        for block, of_block in zip(self._attention, turns, strict=True):
            shape = (0, 0) if of_block is None else of_block.shape
            if block.pairs and shape != (tokens, block.pairs):
                raise ValueError(f"turns have shape {list(shape)}, not {[tokens, block.pairs]}")
        out_TD = torch.empty_like(x_TD)
        self._run(
            self._native,
            address(x_TD),
            address(out_TD),
            tokens,
            [address(of_block) for of_block in turns],
            address(rows_T),
            places.addresses,
            places.rows,
            sequence_arguments(tokens, queries, contexts),
            torch.get_num_threads(),
        )
        return out_TD


def block_run(blocks: Sequence[AnyBlock], isa: str | None = None) -> BlockRun | None:
    """The blocks as one call; None where there are no compiled kernels. isa: the instruction set (None: the best)."""
    usable = [kernels for kernels in instruction_sets() if isa in (None, kernels.isa)]
    return BlockRun(usable[-1], blocks) if usable else None


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


def _layer_arguments(layer: Layer) -> tuple[int, ...]:
    return *weight_arguments(layer.weight), address(layer.bias)
