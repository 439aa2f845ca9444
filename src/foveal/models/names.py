"""Checkpoint names: which stored tensor fills which part of which parameter.

One table for both directions: loading copies into these views, saving writes them out.
"""

import re
from collections.abc import Iterator

from torch import Tensor, nn

from foveal.config import weight_names
from foveal.config.model import (
    GatedDeltaConfig,
    GQAConfig,
    KDAConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    MoEConfig,
)
from foveal.models.decoder import Block, Decoder, Layer
from foveal.nn.linear import FusedLinear
from foveal.nn.moe import Experts
from foveal.nn.recurrent import FusedConvolution

_KINDS = {
    GQAConfig: "gqa",
    MLAConfig: "mla",
    MambaConfig: "mamba",
    Mamba2Config: "mamba2",
    GatedDeltaConfig: "gated_delta",
    KDAConfig: "kda",
    MLPConfig: "mlp",
    MoEConfig: "moe",
}


def checkpoint_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Every checkpoint name of the decoder's family -> a view, outside autograd, of the parameter that it fills.

    A fused parameter gives one view a part, stacked experts one view an expert. Works on the meta device too.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, part in checkpoint_parts(decoder):
        for name, view in part_tensors(decoder, prefix, part).items():
            assert name not in tensors, name
            tensors[name] = view
    return tensors


def part_tensors(decoder: Decoder, prefix: str, part: nn.Module) -> dict[str, Tensor]:
    """What `checkpoint_tensors` holds for one of the `checkpoint_parts`."""
    tensors: dict[str, Tensor] = {}
    for name, view in _views(part, prefix):
        for ours, theirs in weight_names(decoder.config.family).renames:
            name = re.sub(ours, theirs, name)
        assert name not in tensors, name
        tensors[name] = view
    return tensors


def checkpoint_parts(decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """The modules that together hold every parameter, under the names that the family gives them."""
    names = weight_names(decoder.config.family)
    yield names.embedding, decoder.embed_tokens
    for index, (layer, blocks) in enumerate(zip(decoder.layers, decoder.config.layers, strict=True)):
        assert isinstance(layer, Layer)
        at = names.layer.format(index)
        for norm, block, config in zip(names.norms, layer.blocks, blocks, strict=True):
            assert isinstance(block, Block)
            yield f"{at}.{norm}", block.norm
            yield f"{at}.{names.operations[_KINDS[type(config.operation)]]}", block.operation
            if block.indexer is not None:
                yield f"{at}.{names.indexer}", block.indexer
    yield names.final_norm, decoder.norm
    if not decoder.config.tied_embeddings:
        yield names.head, decoder.lm_head


def _views(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for path, child in module.named_modules(prefix=prefix):
        for name, parameter in child.named_parameters(recurse=False):
            if isinstance(child, FusedLinear | FusedConvolution):
                yield from _fused(child, path, name, parameter.detach())
            elif isinstance(child, Experts):
                yield from _experts(path, name, parameter.detach())
            else:
                yield f"{path}.{name}", parameter.detach()


def _fused(module: FusedLinear | FusedConvolution, path: str, name: str, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One view a part; a part stands where the fused module stands."""
    parent, start = path.rpartition(".")[0], 0
    for part, count in module.parts.items():
        yield f"{parent}.{part}.{name}", rows[start : start + count]
        start += count


def _experts(path: str, name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One view an expert: `gate_up_proj` [E, 2F, D] holds gate rows, then up rows; `down_proj` is [E, D, F]."""
    parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    for expert, weight in enumerate(stacked):
        for part, view in zip(parts, weight.chunk(len(parts)), strict=True):
            yield f"{path}.{expert}.{part}.weight", view
