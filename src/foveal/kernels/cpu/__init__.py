"""The compiled kernels for CPUs (C++ in csrc/): each file checks its arguments and passes addresses on.

Importing this room registers them as further versions of the operations, one for each instruction set.
"""

from foveal.kernels.cpu import attention, norm, sparse

__all__ = ["attention", "norm", "sparse"]
