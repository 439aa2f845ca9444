"""Which weights are cut together: a layer at a time, its indexers and experts apart, and the rest at last."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from foveal.models.decoder import Decoder
from foveal.nn.indexer import Indexer
from foveal.nn.moe import Experts, MoE
from foveal.train.parallel.experts import DispatchedExperts


class Root(nn.Module):
    """What FSDP sees of a model: something that is called and returns tensors, from which gradients come back.

    The trainer's losses reach into the middle of a decoder (its trunk, its head's weight, what indexers compute), so
    what is called is the whole computation of a loss.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, run: Callable[[], Any]) -> Any:
        """run()"""
        return run()


def shard_decoder(decoder: Decoder, world: DeviceMesh, experts: DeviceMesh) -> Root:
    """Cut all weights in place. `experts`: dimensions "efsdp" and "ep".

    Gradients are added up over ranks and never divided: losses are already parts of one mean over all tokens. Adding
    and nothing else is also all that gloo can do.
    """
    _check(decoder, experts["ep"].size())
    # Moved by counts that all ranks know, not by gradients: every rank keeps them whole.
    ignored = {p for name, p in decoder.named_parameters() if name.endswith("e_score_correction_bias")}

    def cut(module: nn.Module, mesh: DeviceMesh = world, **how: Any) -> None:
        fully_shard(module, mesh=mesh, ignored_params=ignored, **how)

    for layer in decoder.layers:
        for block in layer.modules():
            if isinstance(block, Experts) and experts["ep"].size() > 1:
                _divide(block, experts["ep"])
                cut(block, experts["efsdp"])
            elif isinstance(block, Indexer):
                _cut_indexer(block, cut, decoder.options.dtype)
        cut(layer)
    root = Root(decoder)
    cut(root)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def _divide(block: Experts, ep: DeviceMesh) -> None:
    """Give each rank of a group its part of the experts."""
    for name, weight in list(block.named_parameters(recurse=False)):
        setattr(block, name, nn.Parameter(distribute_tensor(weight.detach(), ep, [Shard(0)])))
    block.compute = DispatchedExperts(ep.get_group())


def _cut_indexer(indexer: Indexer, cut: Callable[..., None], dtype: torch.dtype) -> None:
    """Its gradients come from a loss that its layer's result knows nothing of, so FSDP could not tell when its weights
    are needed again: they stay whole from the forward pass to the end of the backward pass. They are few. FSDP also
    wants one dtype for what it cuts together, and some of an indexer is always float32."""
    for module in indexer.children():
        if any(p.dtype != dtype for p in module.parameters(recurse=False)):
            cut(module, reshard_after_forward=False)
    cut(indexer, reshard_after_forward=False)


def _check(decoder: Decoder, ep: int) -> None:
    dtype = decoder.options.dtype
    for name, module in decoder.named_modules():
        if isinstance(module, MoE) and len(module.experts.down_proj) % ep:
            raise ValueError(f"parallel.expert = {ep} does not divide the {len(module.experts.down_proj)} experts")
        own = dict(module.named_parameters(recurse=False))
        odd = [key for key, p in own.items() if p.dtype != dtype and key != "e_score_correction_bias"]
        if odd and ".indexer." not in name:
            raise ValueError(f"{name}.{odd[0]} is not {dtype}: such a model trains in one process alone, or in float32")
