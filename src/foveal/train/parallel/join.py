"""How a process finds the others."""

import os
from datetime import timedelta

import torch

from foveal.config import ModelConfig
from foveal.config.model import MambaConfig
from foveal.train.parallel.alone import Parallel
from foveal.train.schema import ParallelSettings, StageSettings


def join(settings: ParallelSettings) -> Parallel:
    """What `torchrun` started, or this process alone. Over NCCL where there are CUDA devices, otherwise over gloo.

    Raises ValueError where the processes cannot be divided as the recipe says.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for name, size in (("expert", settings.expert), ("context", settings.context)):
        if ranks % size:
            raise ValueError(f"parallel.{name} = {size} does not divide {ranks} process{'es' if ranks > 1 else ''}")
    if ranks == 1:
        return Parallel()
    import torch.distributed as dist

    from foveal.train.parallel.together import Together

    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=settings.timeout_minutes))
    return Together(device, expert=settings.expert, context=settings.context)


def check_context(config: ModelConfig, settings: ParallelSettings, stages: tuple[StageSettings, ...]) -> None:
    """ValueError where rows cannot be spread over processes as the recipe says."""
    if settings.context == 1:
        return
    if any(isinstance(block.operation, MambaConfig) for block in config.blocks):
        raise ValueError(f"parallel.context = {settings.context}: a {config.family} has recurrent layers")
    shortest = min(stage.context for stage in stages)
    if shortest < 2 * settings.context:
        raise ValueError(f"parallel.context = {settings.context} is too many for rows of {shortest} tokens")
