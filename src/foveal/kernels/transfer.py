"""From the host to a device without waiting for it: through pinned memory, which torch keeps until it has been read."""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(source: Tensor, device: torch.device | str) -> Tensor:
    """What a CPU tensor is on a device."""
    device = torch.device(device)
    return source if device.type == "cpu" else staged(source, device).to(device, non_blocking=True)


def upload(numbers: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host on a device."""
    return send(torch.tensor(numbers, dtype=dtype), device)


def staged(source: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor where a copy to the device need not be waited for."""
    return source.pin_memory() if torch.device(device).type == "cuda" else source
