"""One launch of a kernel as data, so that what runs on a card is what the tests compile for every card."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.gpu.device import Card

Argument = Tensor | int | float | None
LOG2_E = 1.4426950408889634
"""Scores are multiplied by it, because cards compute powers of two."""


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and tile sizes."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Argument]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        """Start it on the device of its tensors."""
        if 0 in self.grid:
            return
        first = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(first):
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile, keys of a block, and how a program is run."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Choice:
    """What follows from shapes and the device unless given: tiles, ranges of keys, the card."""

    tiles: Tiles | None = None
    splits: int | None = None
    card: Card | None = None


AUTO = Choice()


@dataclass(frozen=True)
class Work:
    """What a call of an attention launches, and its results: [T, H, V], and the natural log-sum-exp of each row's
    scores, float32 [T, H], -inf where it sees nothing."""

    launches: tuple[Launch, ...]
    out_THV: Tensor
    lse_TH: Tensor

    def run(self) -> "Work":
        """Launch everything."""
        for launch in self.launches:
            launch.run()
        return self


def block_size(count: int, least: int = 16) -> int:
    """The power of two that holds `count` numbers; products need at least 16."""
    return max(least, 1 << max(0, count - 1).bit_length())


def ceil_div(count: int, size: int) -> int:
    """How many parts of `size` hold `count`."""
    return -(-count // size)


def choose_splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many ranges of keys work is cut so that it fills the card: two programs a multiprocessor, at least four
    blocks of keys each. It depends on shapes alone, so equal calls sum in the same order."""
    wanted = ceil_div(2 * processors, max(1, programs))
    return max(1, min(wanted, blocks // 4, 64))
