"""What tiles may count on: a card's shared memory, its number types and its multiprocessors."""

from dataclasses import dataclass
from functools import lru_cache

import torch

# Bytes of shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications: "maximum amount of shared memory per thread block", of which the system keeps 1 KiB).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}


@dataclass(frozen=True)
class Card:
    """A graphics card, or the interpreter's stand-in for one."""

    capability: int
    """10 times the compute capability: 80 to 121; 0: the interpreter."""
    processors: int
    """Streaming multiprocessors."""

    @property
    def shared_memory(self) -> int:
        """Bytes that one block may have; of a card that is not known, the least of all."""
        return SHARED_MEMORY.get(self.capability, min(SHARED_MEMORY.values()))

    @property
    def roomy(self) -> bool:
        """Whether tiles for the data centre's cards fit (A100, H100, B200; not the RTX line or the L40S)."""
        return self.shared_memory >= 160 * 1024

    @property
    def reads_shared(self) -> bool:
        """Whether its tensor cores read operands from shared memory (H100, B200), not from registers."""
        return self.capability // 10 in (9, 10)

    @property
    def interpreted(self) -> bool:
        """Whether this is no card at all."""
        return self.capability == 0

    @property
    def native_e4m3(self) -> bool:
        """Whether it converts and multiplies e4m3."""
        return self.capability >= 89


INTERPRETER = Card(0, 2)
"""What CPU tensors are planned for: Triton's interpreter, which is for tests."""


@lru_cache
def card_of(device: torch.device) -> Card:
    """The card behind a device. ValueError below compute capability 8.0, for which these kernels are not made."""
    if device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"the Triton kernels need compute capability 8.0 or higher, not {major}.{minor}")
    return Card(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)
