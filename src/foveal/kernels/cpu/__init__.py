"""The compiled kernels for CPUs (C++ in csrc/): each file checks its arguments and passes addresses on.

Importing this room registers them as further versions of the operations, one for each instruction set.
"""

from foveal.kernels.cpu import norm, quantise, selection

__all__ = ["norm", "quantise", "selection"]
