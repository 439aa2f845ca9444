"""The compiled kernels for CPUs (C++ in csrc/): each file checks its arguments and passes addresses on.

Importing this room registers them as further versions of the operations, one for each instruction set.
"""

from foveal.kernels.cpu import activation, attention, experts, linear, norm, quantise, rope, selection, sparse

__all__ = ["activation", "attention", "experts", "linear", "norm", "quantise", "rope", "selection", "sparse"]
