"""How large the cache becomes."""

from types import SimpleNamespace

import pytest

from foveal.engine import memory
from foveal.engine.memory import CacheDemand, cache_pages

SIZES = SimpleNamespace(page_bytes=1000, slot_bytes=100)
FREE = 100_000


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: FREE)


def test_no_more_than_the_demand_and_no_more_than_a_share() -> None:
    """Guards against a cache that takes all memory, or more than any load can use."""
    assert cache_pages(SIZES, CacheDemand(3, 200, False), None, "cpu") == 1 + 3 * 4
    assert cache_pages(SIZES, CacheDemand(50, 6400, False), None, "cpu") == (FREE // 2 - 51 * 100) // 1000
    stateful = SimpleNamespace(page_bytes=0, slot_bytes=100)
    assert cache_pages(stateful, CacheDemand(3, 200, False), None, "cpu") == 1 + 3 * 4


def test_a_length_that_was_asked_for_fits_or_is_refused() -> None:
    """Guards against accepting a length that no request can ever have."""
    assert cache_pages(SIZES, CacheDemand(1, 64 * 80, True), None, "cpu") == 81
    with pytest.raises(ValueError, match=r"needs 0\.00 GiB, but only 0\.00 GiB"):
        cache_pages(SIZES, CacheDemand(1, 64 * 100, True), None, "cpu")


def test_a_budget_is_kept_or_refused() -> None:
    """Guards against a budget that is passed, ignored or useless."""
    assert cache_pages(SIZES, CacheDemand(1, 64, False), 20_000, "cpu") == 19
    with pytest.raises(ValueError, match="too little"):
        cache_pages(SIZES, CacheDemand(1, 64, False), 2000, "cpu")
    with pytest.raises(ValueError, match=r"needs 1\.86 GiB, but only 0\.00 GiB"):
        cache_pages(SIZES, CacheDemand(1, 64, False), 2 * 10**9, "cpu")
