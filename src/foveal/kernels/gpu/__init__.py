"""The GPU kernels (Triton): version "triton" of the operations, for CUDA devices from SM80 on (docs/gpu.md).

Importing this room registers them; Triton itself is imported when one first runs. Without Triton there are none.
"""

from foveal.kernels.gpu import attention, moe, quantise, selection, training

__all__ = ["attention", "moe", "quantise", "selection", "training"]
