"""Random weights to start from."""

import torch
from torch import nn

from foveal.models.decoder import Decoder, Embedding
from foveal.nn.indexer import Indexer
from foveal.nn.linear import Linear
from foveal.nn.mamba import Mamba
from foveal.nn.moe import Experts, Router

# Weights whose results are added to the residual stream.
_OUTPUTS = ("o_proj", "down_proj", "out_proj")


@torch.no_grad()
def initialise(decoder: Decoder, seed: int) -> None:
    """Give every weight of a new model its first value.

    Matrices: normal, of variance 1 / inputs; those that add to the residual stream are smaller by sqrt(2 x layers)
    (GPT-2). Embeddings: 0.02. Biases: 0. Norms: 1. Depends on the seed and the names alone.
    """
    generator = torch.Generator().manual_seed(seed)
    shrink = (2 * len(decoder.layers)) ** -0.5
    for name, module in decoder.named_modules():
        if isinstance(module, Mamba):
            raise ValueError("a model with Mamba layers cannot be started from random weights yet")
        initialise_module(module, generator, shrink if name.endswith(_OUTPUTS) else 1.0, shrink)


@torch.no_grad()
def initialise_indexers(decoder: Decoder, seed: int) -> None:
    """Give every indexer of the model its first values."""
    generator = torch.Generator().manual_seed(seed)
    for indexer in decoder.modules():
        if isinstance(indexer, Indexer):
            for module in indexer.modules():
                initialise_module(module, generator, 1.0, 1.0)
            indexer.k_norm.weight.fill_(1.0)
            indexer.k_norm.bias.zero_()


def initialise_module(module: nn.Module, generator: torch.Generator, scale: float, expert_scale: float) -> None:
    """The module's own weights, not those of modules in it."""
    if isinstance(module, Embedding):
        _normal(module.weight, 0.02, generator)
    elif isinstance(module, Linear):
        _normal(module.weight, scale * module.weight.shape[1] ** -0.5, generator)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, Router):
        _normal(module.weight, module.weight.shape[1] ** -0.5, generator)
    elif isinstance(module, Experts):
        _normal(module.gate_up_proj, module.gate_up_proj.shape[2] ** -0.5, generator)
        _normal(module.down_proj, expert_scale * module.down_proj.shape[2] ** -0.5, generator)


def _normal(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
