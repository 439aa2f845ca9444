"""The compiled kernels for CPUs (C++ in csrc/): each file checks its arguments and passes addresses on.

Importing this room registers them as further versions of the operations, one for each instruction set.
"""

from foveal.kernels.cpu import (
    activation,
    attention,
    conv,
    delta,
    experts,
    linear,
    norm,
    quantise,
    rope,
    scan,
    selection,
    sparse,
)

__all__ = [
    "activation",
    "attention",
    "conv",
    "delta",
    "experts",
    "linear",
    "norm",
    "quantise",
    "rope",
    "scan",
    "selection",
    "sparse",
]
