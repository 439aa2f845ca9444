"""`foveal doctor`: what this machine offers and what Foveal makes of it."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import foveal
from foveal.cli.options import Json

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "huggingface_hub", "numpy", "triton")
# What kernels can gain from: x86 names first, then Arm's.
_CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
_GIB = 2**30


def doctor(as_json: Json = False) -> None:
    """Show versions, the processor, memory, threads, and which kernel each operation uses."""
    report = {
        "versions": _versions(),
        "processor": _processor(Path("/proc/cpuinfo")),
        "memory": _memory(),
        "torch": _torch(),
        "compiled kernels": _compiled_kernels(),
        "operations": _operations(),
    }
    if as_json:
        print(json.dumps(report))
        return
    for title, facts in report.items():
        print(title)
        for name, fact in facts.items():
            print(f"  {name:<20} {_in_words(fact)}")


def _versions() -> dict[str, str | None]:
    """Version by package; None where one is not installed."""
    found: dict[str, str | None] = {"foveal": foveal.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor(cpuinfo: Path) -> dict[str, Any]:
    """Model, cores and the features that matter here; from Linux's /proc/cpuinfo where that exists."""
    import psutil

    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "model": facts.get("model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "hardware threads": psutil.cpu_count(),
        "features": [feature for feature in _CPU_FEATURES if feature in flags],
    }


def _memory() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": f"{memory.total / _GIB:.1f} GiB", "available": f"{memory.available / _GIB:.1f} GiB"}


def _torch() -> dict[str, Any]:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "cuda devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _compiled_kernels() -> dict[str, Any]:
    from foveal.kernels.cpu import library

    if not library.installed():
        return {"installed": "no: there was no C++ compiler when foveal was installed; torch does their work, slower"}
    return {
        "installed": "yes",
        "instruction sets": [kernels.isa for kernels in library.instruction_sets()],
        "threads from": library.pool_name(),
    }


def _operations() -> dict[str, dict[str, Any]]:
    """The versions of each operation, and the one that runs on the processor."""
    from foveal import kernels

    return {
        operation.name: {"runs": operation.chosen("cpu"), "versions": list(operation.versions)}
        for operation in kernels.operations()
    }


def _in_words(fact: Any) -> str:
    if isinstance(fact, dict):  # an operation
        return f"{fact['runs']} (of {', '.join(fact['versions'])})"
    if isinstance(fact, list):
        return ", ".join(fact) or "none"
    return "unknown" if fact is None else str(fact)
