"""What the machine could do at best, for the share that training makes of it."""

import time

import torch


def matrix_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 1024) -> float:
    """Floating-point operations a second of a square matrix product with the threads that torch has: the best of a
    few."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
