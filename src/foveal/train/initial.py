"""Random weights to start from."""

import math

import torch
from torch import Tensor, nn

from foveal.models.decoder import Decoder, Embedding
from foveal.nn.indexer import Indexer
from foveal.nn.linear import Linear
from foveal.nn.mamba import Mamba
from foveal.nn.moe import Experts, Router
from foveal.nn.recurrent import Convolution, Recurrent
from foveal.nn.s4d import S4D

# Weights whose results are added to the residual stream.
_OUTPUTS = ("o_proj", "down_proj", "out_proj")


@torch.no_grad()
def initialise(decoder: Decoder, seed: int) -> None:
    """Give every weight of a new model its first value.

    Matrices: normal, of variance 1 / inputs; those that add to the residual stream are smaller by sqrt(2 x layers)
    (GPT-2). Embeddings: 0.02. Biases: 0. Norms: 1. Recurrences: see `_start_recurrence`. Depends on the seed and the
    names alone.
    """
    generator = torch.Generator().manual_seed(seed)
    shrink = (2 * len(decoder.layers)) ** -0.5
    for name, module in decoder.named_modules():
        initialise_module(module, generator, shrink if name.endswith(_OUTPUTS) else 1.0, shrink)
    for module in decoder.modules():  # at last: Mamba's time steps are the bias of a layer within
        if isinstance(module, Recurrent):
            _start_recurrence(module, generator)


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
    elif isinstance(module, Convolution):
        _normal(module.weight, module.weight.shape[2] ** -0.5, generator)
        if module.bias is not None:
            module.bias.zero_()


def _start_recurrence(mixer: Recurrent, generator: torch.Generator) -> None:
    """Decays and time steps: A = 1, 2, ... Y in each channel of Mamba-1 (arXiv 2312.00752, section 3.6), elsewhere
    evenly from 1 to 16 by head (arXiv 2405.21060, as in `mamba_ssm`); time steps from 0.001 to 0.1, evenly in their
    logarithm, as what softplus makes of the bias; D = 1."""
    if isinstance(mixer, S4D):
        _start_s4d(mixer, generator)
        return
    parameters = dict(mixer.named_parameters())
    decay = parameters["A_log"]
    if isinstance(mixer, Mamba):
        decay.copy_(torch.arange(1, decay.shape[1] + 1).log().expand_as(decay))
    else:
        decay.copy_((1 + 15 * torch.rand(decay.shape, generator=generator)).log())
    bias = parameters["dt_proj.bias" if isinstance(mixer, Mamba) else "dt_bias"]
    step = _log_steps(bias, generator).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
    if "D" in parameters:
        parameters["D"].fill_(1)


def _start_s4d(mixer: S4D, generator: torch.Generator) -> None:
    """A = -1/2 + i pi n in each channel (S4D-Lin: arXiv 2206.11893, equation 10); C normal; time steps and D as of the
    others."""
    mixer.A_log.fill_(math.log(0.5))
    mixer.A_imag.copy_((math.pi * torch.arange(mixer.config.state)).expand_as(mixer.A_imag))
    _normal(mixer.C, 0.5**0.5, generator)
    mixer.log_dt.copy_(_log_steps(mixer.log_dt, generator))
    mixer.D.fill_(1)


def _log_steps(like: Tensor, generator: torch.Generator) -> Tensor:
    """Logarithms of time steps from 0.001 to 0.1, evenly."""
    return math.log(1e-3) + (math.log(1e-1) - math.log(1e-3)) * torch.rand(like.shape, generator=generator)


def _normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
