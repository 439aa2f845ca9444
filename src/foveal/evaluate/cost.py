"""What a measurement took."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """Of one task on one model."""

    task: str
    seconds: float
    tokens: int
    """Computed: read or written by the model."""
    peak_bytes: int
    """Most memory that the process (or the accelerator) held meanwhile, weights included."""

    def as_dict(self) -> dict[str, float | int | str]:
        """For JSON."""
        return {
            "task": self.task,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "peak_bytes": self.peak_bytes,
        }


def measured(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float, int]:
    """The result of some work, how many seconds it took, and the most bytes that were held meanwhile.

    Where the system cannot forget earlier peaks (anything but Linux), the most that were ever held.
    """
    _forget_peak(device)
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, seconds, _peak(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        _RESET.write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
