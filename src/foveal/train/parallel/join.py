"""How a process finds the others."""

import os
from datetime import timedelta

import torch

from foveal.config import ModelConfig
from foveal.config.model import MambaConfig
from foveal.models.load import usable_device
from foveal.train.parallel.alone import Parallel
from foveal.train.schema import ParallelSettings, StageSettings


def join(settings: ParallelSettings, device: str | None = None) -> Parallel:
    """What `torchrun` started, or this process alone. Over NCCL on CUDA devices, otherwise over gloo.

    device: "cpu", "cuda" (under torchrun each process's own one) or, for one process, "cuda:1"; None: the CPU, under
    torchrun CUDA where there is any.
    Raises ValueError where the processes cannot be divided as the recipe says, or the device cannot be had.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for name, size in (("expert", settings.expert), ("context", settings.context)):
        if ranks % size:
            raise ValueError(f"parallel.{name} = {size} does not divide {ranks} process{'es' if ranks > 1 else ''}")
    own = _own_device(device)
    if ranks == 1:
        return Parallel(own)
    import torch.distributed as dist

    from foveal.train.parallel.together import Together

    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=settings.timeout_minutes))
    return Together(own, expert=settings.expert, context=settings.context)


def _own_device(wanted: str | None) -> torch.device:
    """This process's device, a GPU with its number, from then on the process's current one."""
    local_rank = os.environ.get("LOCAL_RANK")  # torchrun's alone
    if wanted is None:
        wanted = "cuda" if local_rank is not None and torch.cuda.is_available() else "cpu"
    device = usable_device(wanted)
    if device.type == "cpu":
        return device
    if local_rank is not None:
        _check_shared(wanted, device)
    device = torch.device("cuda", int(local_rank or device.index or 0))
    torch.cuda.set_device(device)
    return device


def _check_shared(wanted: str, device: torch.device) -> None:
    """ValueError unless each of the processes that torchrun started on this machine can have a GPU."""
    processes, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(f"device {wanted!r} is one GPU, but torchrun gives every process its own: say cuda")
    if processes > cards:
        raise ValueError(f"torchrun started {processes} processes on this machine, which has only {cards} CUDA devices")


def check_context(config: ModelConfig, settings: ParallelSettings, stages: tuple[StageSettings, ...]) -> None:
    """ValueError where rows cannot be spread over processes as the recipe says."""
    if settings.context == 1:
        return
    if any(isinstance(block.operation, MambaConfig) for block in config.blocks):
        raise ValueError(f"parallel.context = {settings.context}: a {config.family} has recurrent layers")
    shortest = min(stage.context for stage in stages)
    if shortest < 2 * settings.context:
        raise ValueError(f"parallel.context = {settings.context} is too many for rows of {shortest} tokens")
