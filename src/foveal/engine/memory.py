"""How many pages and state slots the cache gets."""

from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from foveal.cache import PAGE_SIZE

# Of free memory; the rest is for activations, and on a CPU for everything else that the machine does.
_SHARE = {"cpu": 0.5, "cuda": 0.85}
_GIB = 2**30
# Where no layer keeps pages they cost nothing but a number each, of which the pool makes a list: enough for 16 million
# tokens. A Mamba counts no positions, and 64 sequences of any length would be a list of a billion.
_NUMBERS = 1 << 18


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

    `whole`: one sequence of that length must fit, or the cache is refused. `snapshots`: of recurrent states, for
    prefixes; as many as there is room for.
    """

    sequences: int
    tokens: int
    whole: bool
    snapshots: int = 0


@dataclass(frozen=True)
class CacheSize:
    """Pages and state slots, the null page and the null slot included."""

    pages: int
    slots: int


def available_memory(device: torch.device | str) -> int:
    """Bytes that are free on the device now."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def cache_size(sizes: Sizes, demand: CacheDemand, budget: int | None, device: torch.device | str) -> CacheSize:
    """How a cache of `budget` bytes is divided: a slot for each sequence, and the rest into pages and snapshots as the
    demand has them.

    None: a share of the free memory, and no more than the demand. ValueError with both figures where it does not fit in
    the memory that is free, or where the budget is too small for one page.
    """
    available = available_memory(device)
    pages_each = -(-demand.tokens // PAGE_SIZE)
    most_pages = demand.sequences * pages_each
    fixed = sizes.page_bytes + (1 + demand.sequences) * sizes.slot_bytes
    least = fixed + (pages_each if demand.whole else 1) * sizes.page_bytes
    wanted = most_pages * sizes.page_bytes + demand.snapshots * sizes.slot_bytes
    if budget is None:
        budget = min(fixed + wanted, max(least, int(available * _SHARE[torch.device(device).type])))
    elif budget < fixed + sizes.page_bytes:
        needed = fixed + sizes.page_bytes
        raise ValueError(f"kv_cache_memory = {budget} bytes is too little: one page and all states need {needed}")
    if budget > available:
        raise ValueError(
            f"the cache needs {budget / _GIB:.2f} GiB, but only {available / _GIB:.2f} GiB of memory are available"
        )
    snapshots = 0
    if demand.snapshots and sizes.slot_bytes:
        share = (budget - fixed) * demand.snapshots // wanted
        snapshots = max(0, min(share, (budget - least) // sizes.slot_bytes))
    rest = budget - fixed - snapshots * sizes.slot_bytes
    numbers = max(pages_each if demand.whole else 1, min(most_pages, _NUMBERS))
    pages = rest // sizes.page_bytes if sizes.page_bytes else numbers
    return CacheSize(1 + pages, 1 + demand.sequences + snapshots if sizes.slot_bytes else 0)
