"""What the compiler made of a kernel: registers, spills, blocks a multiprocessor, and the instructions of its hot loop.

Read from the cubin with NVIDIA's own tools, which come with Triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from foveal.kernels.gpu.device import SHARED_MEMORY

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*);")
_LABEL = re.compile(r"^(\.L\w+):")
_KINDS = {
    "tensor": "HMMA IMMA QMMA HGMMA IGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA",
    "barrier": "BAR",
    "shared": "LDS STS LDSM STSM ATOMS",
    "spill": "LDL STL",
    "float": "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSETP FADD2 FMUL2 FFMA2",
    "convert": "F2FP F2F I2F F2I I2FP HADD2 HMUL2 HFMA2",
    "special": "MUFU",
    "shuffle": "SHFL",
    "atomic": "RED REDG ATOM ATOMG",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_LOADS = {"LDG": "load", "LDGSTS": "asynchronous load"}


@dataclass(frozen=True)
class Code:
    """Facts of one kernel."""

    registers: int
    """A thread."""
    spilled: int
    """Bytes a thread."""
    loop: dict[str, int]
    """Instructions a warp of the hot loop (the longest without another in it that has tensor-core instructions), by
    kind; loads by their bits. Empty: there is none."""

    def blocks(self, capability: int, warps: int, shared: int) -> int:
        """Blocks that one multiprocessor runs at a time."""
        threads = 32 * warps
        of_registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        # The system keeps 1 KiB of each block's.
        of_shared = (SHARED_MEMORY[capability] + 1024) // (shared + 1024)
        of_threads = (1536 if capability in (86, 89, 120) else 2048) // threads
        return min(of_registers, of_shared, of_threads)


def read_code(cubin: bytes) -> Code:
    """The facts of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Code(int(found[1]), int(found[2]), _hot_loop(listing))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _hot_loop(listing: str) -> dict[str, int]:
    names: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            target = re.search(r"\((\.L\w+)\)", instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                loops.append(range(labels[target[1]], len(names) + 1))
            names.append(instruction[1])
    tensor = [place for place, name in enumerate(names) if _kind(name) == "tensor"]
    hot = [loop for loop in loops if any(place in loop for place in tensor)]
    inner = [loop for loop in hot if not any(other != loop and other[0] in loop and other[-1] in loop for other in hot)]
    longest = max(inner, key=len, default=range(0))
    return dict(Counter(_kind(names[place]) for place in longest).most_common())


def _kind(name: str) -> str:
    first, *rest = name.split(".")
    if first in _LOADS:
        bits = next((part for part in rest if part in ("64", "128")), "32")
        return f"{_LOADS[first]} {bits}"
    return _KIND_OF.get(first, "other")
