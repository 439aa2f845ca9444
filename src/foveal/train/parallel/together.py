"""Several processes: weights sharded by FSDP2, experts and contexts spread as the recipe says."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from foveal.models.decoder import Decoder
from foveal.models.save import new_beside, replacing
from foveal.nn.batch import Batch
from foveal.train.optim import Directions
from foveal.train.parallel.alone import Parallel, Result
from foveal.train.parallel.context import share_context
from foveal.train.parallel.directions import direct_together
from foveal.train.parallel.sharding import Root, shard_decoder
from foveal.train.parts import whole_tensor


class Together(Parallel):
    """One of the processes of a group that exists already.

    Three views of the same ranks, neighbours in the last dimension: `world` (weights are cut over all of it), data x
    context (which tokens a rank computes), and efsdp x ep (ep ranks divide the experts; efsdp ranks cut each of these
    parts further).
    """

    def __init__(self, device: torch.device, *, expert: int, context: int) -> None:
        super().__init__(device)
        self.ranks = dist.get_world_size()
        self.leads = dist.get_rank() == 0
        self._world = init_device_mesh(device.type, (self.ranks,), mesh_dim_names=("world",))
        self._experts = init_device_mesh(device.type, (self.ranks // expert, expert), mesh_dim_names=("efsdp", "ep"))
        spread = init_device_mesh(device.type, (self.ranks // context, context), mesh_dim_names=("data", "context"))
        self._data, self._context = spread["data"].get_group(), spread["context"].get_group()
        self.data_rank, self.data_ranks = self._data.rank(), self._data.size()
        self.contexts = context
        self._root: Root | None = None
        # It warns that gathering divided experts is slow; once in a run it may be.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    def shard(self, decoder: Decoder) -> None:
        """See `Parallel.shard`."""
        self._root = shard_decoder(decoder.to(self.device), self._world, self._experts)

    def forward(self, run: Callable[[], Result]) -> Result:
        """See `Parallel.forward`."""
        assert self._root is not None
        result: Result = self._root(run)
        if not torch.is_grad_enabled():  # otherwise the backward pass does it
            for module in self._root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return result

    def total(self, values: Tensor) -> Tensor:
        """See `Parallel.total`."""
        return self._sum(values, None)

    def total_of_data(self, values: Tensor) -> Tensor:
        """See `Parallel.total_of_data`."""
        return self._sum(values, self._data)

    def _sum(self, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = values.to(self.device, copy=True)
        dist.all_reduce(total, group=group)
        return total.to(values.device)

    def first(self, values: Tensor) -> Tensor:
        """See `Parallel.first`."""
        sent = values.to(self.device, copy=True)
        dist.broadcast(sent, 0)
        return sent.to(values.device)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """See `Parallel.any`."""
        return tuple(count > 0 for count in self.total(torch.tensor(flags, dtype=torch.int64)).tolist())

    def share(self, batch: Batch) -> tuple[Batch, Tensor | slice]:
        """See `Parallel.share`."""
        return share_context(batch, self._context) if self.contexts > 1 else super().share(batch)

    def whole(self, batch: Batch, values_TX: Tensor) -> Tensor:
        """See `Parallel.whole`."""
        return values_TX if batch.gathered is None else batch.gathered.gather(values_TX)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """See `Parallel.clip`. Every rank's parts are its own, so that one sum over all ranks serves all meshes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        squares = torch.stack([gradient.square().sum() for gradient in gradients])
        norm = self.total(squares.sum()).sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    def directions(self, shapes: Mapping[Tensor, torch.Size]) -> Directions:
        """See `Parallel.directions`."""
        return partial(direct_together, shapes=shapes, group=self._world.get_group())

    def gathered(self, decoder: Decoder) -> Decoder:
        """See `Parallel.gathered`. In the leading process's memory, on the CPU."""
        with torch.device("meta"):
            whole = Decoder(decoder.config, decoder.options)
        if self.leads:
            whole.to_empty(device="cpu")
        targets = dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                full = whole_tensor(parameter)
                if self.leads:
                    targets[name].copy_(full)
        return whole

    @contextmanager
    def replacing(self, directory: Path) -> Iterator[Path]:
        """See `Parallel.replacing`. It takes its place once all processes are done with it."""
        if not self.leads:
            dist.barrier()
            yield new_beside(directory)
            dist.barrier()
            return
        with replacing(directory) as new:
            dist.barrier()
            yield new
            dist.barrier()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """See `Parallel.leader_first`."""
        first = dist.get_node_local_rank(dist.get_rank()) == 0
        if not first:
            dist.barrier()
        yield
        if first:
            dist.barrier()

    def leave(self) -> None:
        """See `Parallel.leave`."""
        dist.destroy_process_group()
