"""What the machine could do at best, for the share that training makes of it."""

import time

import torch

# Rows of the matrices, and products between two looks at the clock: on a GPU the wait at the end hardly counts then.
_SIZES = {"cpu": (1024, 1), "cuda": (4096, 8)}


def matrix_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Floating-point operations a second of a square matrix product, on a CPU with the threads that torch has: the best
    of a few."""
    size, products = _SIZES[torch.device(device).type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(products):
            c = a @ b
        c[0, 0].item()  # waits for the device
        best = max(best, products * 2 * size**3 / (time.perf_counter() - start))
    return best
