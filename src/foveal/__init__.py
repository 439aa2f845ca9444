"""Foveal: language models that attend only where it matters.

The public names load on first use, so that `import foveal` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveal import kernels
    from foveal.engine import LLM, Guidance, SamplingParams
    from foveal.models.load import load_model

__version__ = "0.1.0"
__all__ = ["LLM", "Guidance", "SamplingParams", "__version__", "kernels", "load_model"]

_HOME = {
    "LLM": "foveal.engine",
    "Guidance": "foveal.engine",
    "SamplingParams": "foveal.engine",
    "load_model": "foveal.models.load",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("foveal.kernels")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'foveal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
