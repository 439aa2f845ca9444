"""The block pool, the slot pool and the prefix index, each alone."""

from collections import Counter

import pytest

from foveal.cache import PAGE_SIZE, BlockPool
from foveal.cache.prefix import PrefixIndex
from foveal.cache.slots import SlotPool


def index_pages(index: PrefixIndex, pages: list[int]) -> None:
    """Make `pages` hold one prefix."""
    node = index.root(None)
    for page in pages:
        node = index.insert(node, (page,) * PAGE_SIZE, page)


def test_null_page_is_never_handed_out():
    """Guards against a sequence owning page 0, where padded table entries point."""
    pool = BlockPool(6, PrefixIndex())
    assert pool.take(5) == [1, 2, 3, 4, 5]
    assert pool.available == 0
    with pytest.raises(AssertionError):
        pool.take(1)


def test_growth_prefers_the_following_page():
    """Guards against scattered pages where consecutive ones are free: kernels would gather instead of taking a view."""
    pool = BlockPool(10, PrefixIndex())
    first = pool.take(2)
    pool.release(reversed(pool.take(5)))
    other = pool.take(1, after=6)
    assert (first, other) == ([1, 2], [7])
    assert pool.take(2, after=2) == [3, 4]
    assert pool.take(2, after=6) == [5, 6], "7 is taken: the last released comes next, and then its follower"


def test_released_pages_come_back_ascending():
    """Guards against a second sequence getting its pages in falling order after the first one is gone."""
    pool = BlockPool(9, PrefixIndex())
    pages = pool.take(4)
    pool.release(reversed(pages))
    assert pool.take(4) == pages


def test_free_pages_before_cached_ones_and_tail_before_head():
    """Guards against evicting a reusable page while an unused one is free, and a prefix's head before its tail."""
    index = PrefixIndex()
    pool = BlockPool(6, index)
    pages = pool.take(3)
    index_pages(index, pages)
    pool.release(reversed(pages))
    assert (pool.free, pool.cached) == (2, 3)
    assert sorted(pool.take(2)) == [4, 5]
    assert pool.take(3) == [3, 2, 1]
    assert not any(page in index for page in pages), "an evicted page is no longer found"


def test_a_hit_page_is_not_evicted():
    """Guards against a page staying in the eviction queue after a hit."""
    index = PrefixIndex()
    pool = BlockPool(4, index)
    pages = pool.take(3)
    index_pages(index, pages)
    pool.release(pages)
    pool.share([1])
    assert pool.take(2) == [2, 3]
    assert (pool.in_use, pool.available) == (3, 0)
    pool.check(Counter({1: 1, 2: 1, 3: 1}))


def test_shared_page_needs_every_owner_to_leave():
    """Guards against a page being handed out while a second owner still reads it."""
    pool = BlockPool(3, PrefixIndex())
    pages = pool.take(1)
    pool.share(pages)
    pool.release(pages)
    assert pool.in_use == 1
    pool.release(pages)
    assert pool.in_use == 0
    with pytest.raises(AssertionError):
        pool.release(pages)


def test_sharing_an_unknown_page_fails():
    """Guards against sharing a page whose content is nobody's."""
    with pytest.raises(AssertionError):
        BlockPool(3, PrefixIndex()).share([1])


def test_pool_check_sees_a_wrong_owner_count():
    """Guards against a check that passes whatever the pool counts."""
    pool = BlockPool(3, PrefixIndex())
    pool.take(1)
    pool.check(Counter({1: 1}))
    for wrong in ({}, {1: 2}, {1: 1, 2: 1}):
        with pytest.raises(AssertionError):
            pool.check(wrong)


def test_slots():
    """Guards against handing out the null slot, the same slot twice, or more slots than there are."""
    slots = SlotPool(3)
    taken = [slots.take(), slots.take()]
    assert taken == [1, 2]
    assert slots.available == 0
    slots.check(taken)
    with pytest.raises(AssertionError):
        slots.take()
    slots.release(1)
    with pytest.raises(AssertionError):
        slots.release(1)
    with pytest.raises(AssertionError):
        slots.check(taken)
    assert slots.take() == 1


def test_evicted_parent_hides_its_children_until_it_is_back():
    """Guards against losing the pages after an evicted one for good, or hitting them without their parent."""
    index = PrefixIndex()
    root = index.root(None)
    first, second = (1,) * PAGE_SIZE, (2,) * PAGE_SIZE
    index.insert(index.insert(root, first, 1), second, 2)
    index.remove(1)
    assert index.match(root, first + second, limit=2) == []
    index.insert(root, first, 3)
    assert [node.page for node in index.match(root, first + second, limit=2)] == [3, 2]
    index.check()


def test_nodes_nobody_needs_are_gone():
    """Guards against an index that grows for ever, and a deep prefix whose end overflows the stack."""
    index = PrefixIndex()
    node = index.root(None)
    for page in range(1, 20_001):
        node = index.insert(node, (page % 7,) * PAGE_SIZE, page)
    for page in range(1, 20_001):
        index.remove(page)
    assert len(index._nodes) == 20_001, "the last node still needs all before it"
    del node
    assert len(index._nodes) == 0
