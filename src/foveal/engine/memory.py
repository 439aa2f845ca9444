"""How many pages the cache gets."""

from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from foveal.cache import PAGE_SIZE

# Of free memory; the rest is for activations, and on a CPU for everything else that the machine does.
_SHARE = {"cpu": 0.5, "cuda": 0.85}
_GIB = 2**30


class Sizes(Protocol):
    """What a page and a slot cost: `foveal.cache.store.CachePlan`."""

    @property
    def page_bytes(self) -> int:
        """All layers' records of PAGE_SIZE tokens."""

    @property
    def slot_bytes(self) -> int:
        """All layers' recurrent states of one sequence."""


@dataclass(frozen=True)
class CacheDemand:
    """What the cache must hold: so many sequences of at most so many tokens.

    `whole`: one sequence of that length must fit, or the cache is refused.
    """

    sequences: int
    tokens: int
    whole: bool


def available_memory(device: torch.device | str) -> int:
    """Bytes that are free on the device now."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def cache_pages(sizes: Sizes, demand: CacheDemand, budget: int | None, device: torch.device | str) -> int:
    """The number of pages, null page included, for a cache of `budget` bytes.

    None: a share of the free memory, and no more than the demand. ValueError with both figures where it does not fit in
    the memory that is free, or where the budget is too small for one page.
    """
    available = available_memory(device)
    slots = (demand.sequences + 1) * sizes.slot_bytes
    pages_each = -(-demand.tokens // PAGE_SIZE)
    least = slots + (1 + (pages_each if demand.whole else 1)) * sizes.page_bytes
    most = slots + (1 + demand.sequences * pages_each) * sizes.page_bytes
    if budget is None:
        budget = min(most, max(least, int(available * _SHARE[torch.device(device).type])))
    elif budget < slots + 2 * sizes.page_bytes:
        needed = slots + 2 * sizes.page_bytes
        raise ValueError(f"kv_cache_memory = {budget} bytes is too little: one page and all states need {needed}")
    if budget > available:
        raise ValueError(
            f"the cache needs {budget / _GIB:.2f} GiB, but only {available / _GIB:.2f} GiB of memory are available"
        )
    # A model without attention layers needs no memory for pages, only their numbers.
    return (budget - slots) // sizes.page_bytes if sizes.page_bytes else 1 + demand.sequences * pages_each
