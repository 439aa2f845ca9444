"""Whole residual blocks, x + operation(norm(x)), in one call (csrc/kernels/block.cpp), for steps of few tokens.

Built once from a block's weights, whose addresses they keep: a weight that is replaced afterwards is not noticed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.config.model import GQAConfig
from foveal.kernels.cpu.activation import COMPILED
from foveal.kernels.cpu.library import FORMATS, Kernels, address, instruction_sets
from foveal.kernels.cpu.linear import takes_weight, weight_arguments
from foveal.kernels.cpu.places import sequence_arguments
from foveal.kernels.cpu.rope import MOST_PAIRS
from foveal.kernels.keys import Contexts, Queries
from foveal.kernels.matmul import Weight

_DTYPES = (torch.float32, torch.bfloat16)


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
class CachedKeys:
    """Where a step's new keys and values go, and where all of each sequence's are."""

    rows_T: Tensor
    """int64 [T]: cache rows of the new tokens."""
    keys_XGP: Tensor
    values_XGP: Tensor
    queries: Queries
    contexts: Contexts


class FusedGQA:
    """x + attention(norm(x)) over cached keys. `heads`: the norms of queries and keys, where there are any."""

    def __init__(
        self, kernels: Kernels, config: GQAConfig, norm: Norm, qkv: Layer, out: Layer, heads: tuple[Norm, Norm] | None
    ) -> None:
        self._run, self._dtype, self._hidden = kernels.run.gqa_block, norm.weight_X.dtype, norm.weight_X.shape[0]
        self._row = (config.kv_heads, config.head_dim)
        self._pairs = config.rope.dim // 2 if config.rope else 0
        self._weights = (norm, qkv, out, heads)  # kept alive
        self._block = kernels.run.GqaBlock(
            _norm_arguments(norm),
            _layer_arguments(qkv),
            _layer_arguments(out),
            tuple(address(one.weight_X) for one in heads) if heads else (0, 0),
            (config.heads, config.kv_heads, config.head_dim),
            self._pairs,
            bool(config.rope and config.rope.interleaved),
            config.scale,
            config.window or 0,
        )

    def __call__(self, x_TD: Tensor, turns_TR: Tensor | None, cached: CachedKeys) -> Tensor:
        """[T, D] -> [T, D]; turns_TR: see `apply_rope`. ValueError where the arguments do not fit the block."""
        _check_input(x_TD, self._hidden, self._dtype)
        tokens = x_TD.shape[0]
        if turns_TR is not None and (turns_TR.shape != (tokens, self._pairs) or not turns_TR.is_contiguous()):
            raise ValueError(f"turns have shape {list(turns_TR.shape)}, x {list(x_TD.shape)}")
        if cached.rows_T.shape[0] != tokens or cached.queries.offsets[-1] != tokens:
            raise ValueError(f"{tokens} tokens, {cached.rows_T.shape[0]} rows, {cached.queries.offsets[-1]} queries")
        keys_XGP, values_XGP = cached.keys_XGP, cached.values_XGP
        for part in (keys_XGP, values_XGP):
            if part.shape[1:] != self._row or part.dtype != self._dtype or not part.is_contiguous():
                raise ValueError(f"a cache of {part.dtype} {list(part.shape)} is not one of this block")
        out_TD = torch.empty_like(x_TD)
        self._run(
            self._block,
            x_TD.data_ptr(),
            out_TD.data_ptr(),
            tokens,
            address(turns_TR),
            cached.rows_T.data_ptr(),
            keys_XGP.data_ptr(),
            values_XGP.data_ptr(),
            min(keys_XGP.shape[0], values_XGP.shape[0]),
            sequence_arguments(cached.queries, cached.contexts),
            torch.get_num_threads(),
        )
        return out_TD


class FusedMLP:
    """x + down(act(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, kernels: Kernels, norm: Norm, gate_up: Layer, down: Layer, activation: str) -> None:
        self._run, self._dtype, self._hidden = kernels.run.mlp_block, norm.weight_X.dtype, norm.weight_X.shape[0]
        self._weights = (norm, gate_up, down)  # kept alive
        self._block = kernels.run.MlpBlock(
            _norm_arguments(norm), _layer_arguments(gate_up), _layer_arguments(down), COMPILED[activation]
        )

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]. ValueError where x does not fit the block."""
        _check_input(x_TD, self._hidden, self._dtype)
        out_TD = torch.empty_like(x_TD)
        self._run(self._block, x_TD.data_ptr(), out_TD.data_ptr(), x_TD.shape[0], torch.get_num_threads())
        return out_TD


def fuse_gqa(
    config: GQAConfig,
    norm: Norm,
    qkv: Layer,
    out: Layer,
    heads: tuple[Norm, Norm] | None,
    *,
    isa: str | None = None,
) -> FusedGQA | None:
    """An attention block as one call; None where there are no compiled kernels, or none for its dtype and layout.

    isa: the instruction set to use (None: the best).
    """
    kernels = _kernels(isa)
    pairs = config.rope.dim // 2 if config.rope else 0
    norms = [norm, *(heads or ())]
    if kernels is None or pairs > MOST_PAIRS or not _fusable(norms, [qkv, out], norm.weight_X.dtype):
        return None
    width = (config.heads + 2 * config.kv_heads) * config.head_dim
    assert qkv.weight.shape == (width, len(norm.weight_X))
    assert out.weight.shape == (len(norm.weight_X), config.heads * config.head_dim)
    return FusedGQA(kernels, config, norm, qkv, out, heads)


def fuse_mlp(norm: Norm, gate_up: Layer, down: Layer, activation: str, *, isa: str | None = None) -> FusedMLP | None:
    """A gated feed-forward block as one call; None as in `fuse_gqa`, or where its activation is not compiled."""
    kernels = _kernels(isa)
    if kernels is None or activation not in COMPILED or not _fusable([norm], [gate_up, down], norm.weight_X.dtype):
        return None
    outputs, inputs = down.weight.shape
    assert gate_up.weight.shape == (2 * inputs, outputs) and outputs == len(norm.weight_X)
    return FusedMLP(kernels, norm, gate_up, down, activation)


def _kernels(isa: str | None) -> Kernels | None:
    usable = [kernels for kernels in instruction_sets() if isa in (None, kernels.isa)]
    return usable[-1] if usable else None


def _fusable(norms: list[Norm], layers: list[Layer], dtype: torch.dtype) -> bool:
    """Whether everything is of one supported dtype, on the CPU and laid out as the kernels read it."""
    vectors = [one.weight_X for one in norms] + [layer.bias for layer in layers if layer.bias is not None]
    return (
        dtype in _DTYPES
        and all(v.dtype == dtype and v.device.type == "cpu" and v.is_contiguous() for v in vectors)
        and all(takes_weight(layer.weight, dtype) for layer in layers)
    )


def _norm_arguments(norm: Norm) -> tuple[int, int, float, int]:
    return address(norm.weight_X), norm.weight_X.shape[0], norm.eps, FORMATS[norm.weight_X.dtype]


def _layer_arguments(layer: Layer) -> tuple[int, ...]:
    return *weight_arguments(layer.weight), address(layer.bias)


def _check_input(x_TD: Tensor, hidden: int, dtype: torch.dtype) -> None:
    if x_TD.dim() != 2 or x_TD.shape[1] != hidden or x_TD.dtype != dtype or not x_TD.is_contiguous():
        raise ValueError(f"x is {x_TD.dtype} {list(x_TD.shape)}, the block takes {dtype} [T, {hidden}]")
