"""Compiling a launch for a card that is not there, as running it on one would."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveal.kernels.gpu.launch import Launch

CAPABILITIES = (80, 86, 89, 90, 100, 120)
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """What came of it."""

    cubin: bytes
    ptx: str
    shared_memory: int
    arguments: tuple[Tensor | float | int, ...]
    """What is left of the launch's after the constants."""


def compile_for(launch: Launch, capability: int) -> Compiled:
    """The launch's kernel, specialised as Triton does for these arguments."""
    signature, constants, attributes, arguments = {}, dict(launch.constants), {}, []
    for place, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        signature[name] = _type(value)
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        arguments.append(value)
        if _divisible(value):
            attributes[(place,)] = _DIVISIBLE
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    asm = compiled.asm
    return Compiled(asm["cubin"], asm["ptx"], compiled.metadata.shared, tuple(arguments))


def _type(value: Tensor | float | int | None) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) and -(2**31) <= value < 2**31 else "i64"


def _divisible(value: Tensor | float | int | None) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
