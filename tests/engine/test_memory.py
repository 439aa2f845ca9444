"""How large the cache becomes."""

from types import SimpleNamespace

import pytest

from foveal.engine import memory
from foveal.engine.memory import CacheDemand, CacheSize, cache_size

SIZES = SimpleNamespace(page_bytes=1000, slot_bytes=100)
STATELESS = SimpleNamespace(page_bytes=1000, slot_bytes=0)
FREE = 100_000


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: FREE)


def test_no_more_than_the_demand_and_no_more_than_a_share() -> None:
    """Guards against a cache that takes all memory, or more than any load can use."""
    assert cache_size(SIZES, CacheDemand(3, 200, False), None, "cpu") == CacheSize(1 + 3 * 4, 1 + 3)
    pages = (FREE // 2 - 51 * 100) // 1000
    assert cache_size(SIZES, CacheDemand(50, 6400, False), None, "cpu") == CacheSize(pages, 51)
    stateful = SimpleNamespace(page_bytes=0, slot_bytes=100)
    assert cache_size(stateful, CacheDemand(3, 200, False), None, "cpu") == CacheSize(1 + 3 * 4, 1 + 3)
    assert cache_size(STATELESS, CacheDemand(3, 200, False, snapshots=9), None, "cpu") == CacheSize(1 + 3 * 4, 0)


def test_pages_that_are_only_numbers_are_not_listed_by_the_billion() -> None:
    """Guards against a Mamba taking all memory for the numbers of pages: no position limits its length."""
    stateful = SimpleNamespace(page_bytes=0, slot_bytes=100)
    assert cache_size(stateful, CacheDemand(64, 1 << 30, False), None, "cpu") == CacheSize(1 + (1 << 18), 65)
    assert cache_size(stateful, CacheDemand(64, 1 << 30, True), None, "cpu") == CacheSize(1 + (1 << 24), 65)


def test_a_length_that_was_asked_for_fits_or_is_refused() -> None:
    """Guards against accepting a length that no request can ever have."""
    assert cache_size(SIZES, CacheDemand(1, 64 * 80, True), None, "cpu").pages == 81
    with pytest.raises(ValueError, match=r"needs 0\.00 GiB, but only 0\.00 GiB"):
        cache_size(SIZES, CacheDemand(1, 64 * 100, True), None, "cpu")


def test_a_budget_is_kept_or_refused() -> None:
    """Guards against a budget that is passed, ignored or useless."""
    assert cache_size(SIZES, CacheDemand(1, 64, False), 20_000, "cpu").pages == 19
    with pytest.raises(ValueError, match="too little"):
        cache_size(SIZES, CacheDemand(1, 64, False), 2000, "cpu")
    with pytest.raises(ValueError, match=r"needs 1\.86 GiB, but only 0\.00 GiB"):
        cache_size(SIZES, CacheDemand(1, 64, False), 2 * 10**9, "cpu")


@pytest.mark.parametrize("budget", [2_600, 3_100, 5_000, 20_000, 21_400, 60_000])
@pytest.mark.parametrize("whole", [True, False])
def test_snapshots_share_one_budget_with_pages_and_slots(budget: int, whole: bool) -> None:
    """Guards against snapshots beyond the budget, in the room of a sequence's own state or of the one sequence that
    must fit, and against a budget that is left unused."""
    demand = CacheDemand(5, 256, whole, snapshots=20)
    size = cache_size(SIZES, demand, budget, "cpu")
    assert budget - SIZES.page_bytes < size.pages * SIZES.page_bytes + size.slots * SIZES.slot_bytes <= budget
    assert size.slots >= 1 + 5
    assert size.pages >= min(5 if whole else 2, (budget - 6 * 100) // 1000)
    if budget >= 20_000:
        assert size.slots > 6 and abs((size.slots - 6) / (size.pages - 1) - 20 / 20) < 0.1, "as the demand has them"


def test_all_that_is_wanted() -> None:
    """Guards against a cache without budget that has no room for snapshots, or has more than were asked for."""
    demand = CacheDemand(5, 256, True, snapshots=20)
    assert cache_size(SIZES, demand, None, "cpu") == CacheSize(1 + 5 * 4, 1 + 5 + 20)
    stateful = SimpleNamespace(page_bytes=0, slot_bytes=100)
    assert cache_size(stateful, demand, None, "cpu") == CacheSize(1 + 5 * 4, 1 + 5 + 20)
    assert cache_size(stateful, demand, 3_050, "cpu") == CacheSize(1 + 5 * 4, 30), "states can use no pages' memory"
