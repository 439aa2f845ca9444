"""What devices can do: bandwidth, arithmetic, memory. Built in from data sheets, or measured on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

_GIGA, _TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """One device. Peaks, not what a kernel reaches: a time computed from them is a lower bound."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_second: float
    flops_per_second: dict[str, float] = field(hash=False)
    """Dense floating-point operations by dtype, two a multiply-accumulate."""
    link_bytes_per_second: float | None
    """To other devices, one way; None: there are none."""
    source: str

    def rate(self, dtype: str) -> float:
        """Operations a second on numbers of `dtype`, widened where need be."""
        return self.flops_per_second[self.computes_in(dtype)]

    def computes_in(self, dtype: str) -> str:
        """`dtype`, or what the device widens it to where it has no units for it: fp8 and int8 to bfloat16, that to
        float32."""
        return next(wider for wider in (dtype, "bfloat16", "float32") if wider in self.flops_per_second)


DEVICES = {
    "h100": Device(
        "NVIDIA H100 SXM",
        80 * _GIGA,
        3.35 * _TERA,
        {"float32": 66.9 * _TERA, "bfloat16": 989.4 * _TERA, "fp8": 1978.9 * _TERA, "int8": 1978.9 * _TERA},
        450 * _GIGA,
        "NVIDIA H100 Tensor Core GPU data sheet (dense; NVLink 900 GB/s in both directions together)",
    ),
    "h200": Device(
        "NVIDIA H200 SXM",
        141 * _GIGA,
        4.8 * _TERA,
        {"float32": 66.9 * _TERA, "bfloat16": 989.4 * _TERA, "fp8": 1978.9 * _TERA, "int8": 1978.9 * _TERA},
        450 * _GIGA,
        "NVIDIA H200 Tensor Core GPU data sheet (dense; NVLink 900 GB/s in both directions together)",
    ),
    "a100": Device(
        "NVIDIA A100 SXM 80GB",
        80 * _GIGA,
        2.039 * _TERA,
        {"float32": 19.5 * _TERA, "bfloat16": 312 * _TERA, "int8": 624 * _TERA},
        300 * _GIGA,
        "NVIDIA A100 Tensor Core GPU data sheet (dense; NVLink 600 GB/s in both directions together)",
    ),
    "rtx-4090": Device(
        "NVIDIA GeForce RTX 4090",
        24 * _GIGA,
        1.008 * _TERA,
        {"float32": 82.6 * _TERA, "bfloat16": 165.2 * _TERA, "fp8": 330.3 * _TERA, "int8": 660.6 * _TERA},
        32 * _GIGA,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A (dense, float32 accumulation; PCIe 4.0 x16)",
    ),
}
MEASURED = "measured"


def find_device(name: str) -> Device:
    """A built-in device, or this machine (`measured`). ValueError for another name."""
    if name == MEASURED:
        return measure_device()
    if name not in DEVICES:
        raise ValueError(f"no device {name!r} (only {', '.join(DEVICES)} and {MEASURED})")
    return DEVICES[name]


def measure_device(clock: Callable[[], float] = time.perf_counter) -> Device:
    """This machine's memory bandwidth and float32 matrix rate, in about two seconds, with numpy's matrix library on all
    the threads that it takes.

    Bandwidth: a matrix of 256 MiB, too large for any cache, times a vector, which reads every number once, as decoding
    reads weights. Rate: a product of two 2048 x 2048 matrices. The best of several runs, since what others do on the
    machine only ever slows them down. bfloat16 and fp8 are computed as float32 here (`Device.rate`). `clock` tells
    seconds: the processor time of a thread leaves out what others do, where one thread does all the work.
    """
    import numpy as np
    import psutil

    generator = np.random.default_rng(0)
    tall = generator.standard_normal((1 << 14, 1 << 12), dtype=np.float32)
    vector = generator.standard_normal(1 << 12, dtype=np.float32)
    square = generator.standard_normal((2048, 2048), dtype=np.float32)
    bandwidth = tall.nbytes / _best_seconds(lambda: tall @ vector, clock)
    rate = 2 * 2048**3 / _best_seconds(lambda: square @ square, clock)
    memory = float(psutil.virtual_memory().total)
    return Device("this machine", memory, bandwidth, {"float32": rate}, None, "measured now, with numpy")


def _best_seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """The shortest of the runs that fit into a second (three at least, the first not counted)."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1.0:
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)
