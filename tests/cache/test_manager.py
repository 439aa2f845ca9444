"""The cache manager, case by case; `test_state_machine.py` mixes everything."""

import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain

import pytest

from foveal.cache import PAGE_SIZE, CacheManager, Copies


def compute(manager: CacheManager, key: str, tokens: Sequence[int]) -> None:
    """Reserve and commit, as the engine does around a step."""
    assert manager.reserve(key, len(tokens))
    manager.commit(key, tokens, len(tokens))
    manager.check()


def run(manager: CacheManager, key: str, tokens: Sequence[int], salt: str | None = None) -> int:
    """A whole sequence, admitted and computed; its hit."""
    hit = manager.admit(key, tokens, salt)
    compute(manager, key, tokens)
    return hit


class Colliding(int):
    """A token whose hash is that of every other: pages of them all have one hash."""

    def __hash__(self) -> int:
        return 0


class Watched(Sequence):
    """Counts the tokens that are read."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.read = tokens, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        part = self.tokens[index]
        self.read += len(part) if isinstance(index, slice) else 1
        return part


@pytest.mark.parametrize(("length", "hit"), [(64, 0), (65, 64), (127, 64), (128, 64), (129, 128), (200, 192)])
def test_fully_cached_prompt_leaves_a_token(length: int, hit: int):
    """Guards against a fully cached, page-aligned prompt that leaves nothing to compute, and so no logits."""
    manager = CacheManager(16)
    tokens = list(range(length))
    assert run(manager, "first", tokens) == 0
    assert run(manager, "second", tokens) == hit
    pages = hit // PAGE_SIZE
    assert manager.table("second")[:pages] == manager.table("first")[:pages]
    assert not set(manager.table("second")[pages:]) & set(manager.table("first"))
    manager.free("first")
    assert run(manager, "third", tokens) == hit


def test_empty_prompt():
    """Guards against a negative hit."""
    manager = CacheManager(4)
    assert manager.admit("a", []) == 0
    manager.commit("a", [], 0)
    assert manager.table("a") == []


def test_equal_hashes_are_no_hit():
    """Guards against a hash collision handing one prompt's pages to another."""
    manager = CacheManager(32)
    prompts = [
        [Colliding(first)] * PAGE_SIZE + [Colliding(second)] * PAGE_SIZE for first in (1, 2) for second in (3, 4)
    ]
    assert len({hash(tuple(prompt[:PAGE_SIZE])) for prompt in prompts}) == 1
    hits = [run(manager, str(prompt), [*prompt, 0]) for prompt in prompts]
    assert hits == [0, 64, 0, 64], "only the first page of the same tokens is a hit"
    assert [manager.admit(str(prompt) + "again", [*prompt, 0]) for prompt in prompts] == [128] * 4


def test_same_page_after_another_prefix_is_no_hit():
    """Guards against a page found by its own tokens alone."""
    manager = CacheManager(16)
    one, two, three = ([label] * PAGE_SIZE for label in (1, 2, 3))
    run(manager, "a", [*one, *two, 0])
    assert run(manager, "b", [*three, *two, 0]) == 0
    assert run(manager, "c", [*two, 0]) == 0


def test_salts_are_apart():
    """Guards against one salt seeing what another has cached."""
    manager = CacheManager(16)
    tokens = [7] * 130
    assert run(manager, "a", tokens, "x") == 0
    assert run(manager, "b", tokens, "y") == 0
    assert run(manager, "c", tokens) == 0
    assert run(manager, "d", tokens, "y") == 128


def test_a_sequence_that_is_not_reusable_leaves_no_page_cached():
    """Guards against pages that nobody can hit and that evict others, and against a hit where every row is wanted."""
    manager = CacheManager(8)
    tokens = [1] * 130
    run(manager, "a", tokens)
    manager.free("a")
    assert manager.admit("b", tokens, reusable=False) == 0
    compute(manager, "b", tokens)
    assert manager.fork("b", "c") is not None
    compute(manager, "c", [*tokens, *[2] * 70])
    manager.free("b")
    manager.free("c")
    assert (manager.usage.pages_cached, manager.usage.prefix_query_tokens) == (2, 130)
    assert run(manager, "d", [*tokens, *[2] * 70]) == 128


def test_prefix_caching_off():
    """Guards against hits where the user wants none."""
    manager = CacheManager(8, prefix_caching=False)
    for key in "ab":
        assert run(manager, key, [1] * 130) == 0
    manager.free("a")
    usage = manager.usage
    assert (usage.pages_cached, usage.prefix_query_tokens) == (0, 0)


def test_pages_are_not_cached_before_they_are_computed():
    """Guards against a hit on pages that are reserved and not yet written."""
    manager = CacheManager(16)
    tokens = [1] * 200
    manager.admit("a", tokens)
    assert manager.reserve("a", 200)
    assert run(manager, "b", tokens[:100]) == 0
    manager.commit("a", tokens, 130)
    assert manager.admit("c", tokens) == 128


def test_duplicate_pages_stay_private():
    """Guards against two sequences that compute the same tokens at once: the first page stays the one that is found."""
    manager = CacheManager(16)
    tokens = [1] * 100
    manager.admit("a", tokens)
    manager.admit("b", tokens)
    compute(manager, "a", tokens)
    compute(manager, "b", tokens)
    first, second = manager.table("a")[0], manager.table("b")[0]
    assert first != second
    manager.admit("c", tokens)
    assert manager.table("c") == [first]
    manager.free("b")
    assert manager.usage.pages_cached == 0, "a duplicate is not worth keeping"


def test_reserve_is_all_or_nothing():
    """Guards against a failed reservation that keeps pages."""
    manager = CacheManager(5)
    manager.admit("a", [1])
    assert manager.reserve("a", 130)
    before = list(manager.table("a")), manager.usage
    assert not manager.reserve("a", 257)
    assert (manager.table("a"), manager.usage) == before
    assert manager.reserve("a", 256)
    assert manager.reserve("a", 10), "less than there is needs nothing"
    assert len(manager.table("a")) == 4


def test_eviction_spares_the_pages_being_hit():
    """Guards against a sequence evicting its own prefix to make room for the rest."""
    manager = CacheManager(6)
    prompt = [1] * 128
    run(manager, "a", [*prompt, 0])
    manager.free("a")
    run(manager, "b", [2] * 128)
    manager.free("b")
    assert manager.admit("c", prompt + [3] * 100) == 128
    hit = list(manager.table("c"))
    assert manager.reserve("c", 320), "three more: the free page and both of b's"
    assert manager.table("c")[:2] == hit
    assert len(set(manager.table("c"))) == 5
    assert not manager.reserve("c", 321)
    manager.check()


def test_the_tail_is_evicted_first():
    """Guards against evicting a prefix's head: what follows it could not be hit any more."""
    manager = CacheManager(5)
    prompt = [1] * 64 + [2] * 64 + [3] * 64 + [4] * 64
    run(manager, "a", prompt)
    manager.free("a")
    run(manager, "b", [5] * 100)
    manager.free("b")
    assert manager.admit("c", prompt) == 128


def test_a_lone_sequence_has_consecutive_pages():
    """Guards against a sequence alone in the cache whose pages are scattered."""
    manager = CacheManager(12)
    tokens: list[int] = []
    manager.admit("a", tokens)
    for token in range(300):
        tokens.append(token)
        compute(manager, "a", tokens)
    table = manager.table("a")
    assert table == list(range(table[0], table[0] + 5))


def test_commit_reads_new_pages_only():
    """Guards against work that grows with the length of the sequence at every token."""
    manager = CacheManager(200)
    tokens = Watched([1] * 12_000)
    manager.admit("a", [])
    compute(manager, "a", tokens)
    for _ in range(200):
        tokens.tokens.append(2)
        tokens.read = 0
        compute(manager, "a", tokens)
        assert tokens.read == (PAGE_SIZE if len(tokens) % PAGE_SIZE == 0 else 0)


def test_commit_of_a_chunk_reads_its_pages_only():
    """Guards against copying a long prompt once for each of its chunks, and against caching beyond what is computed."""
    manager = CacheManager(20)
    tokens = Watched([1] * 1000)
    manager.admit("a", [])
    assert manager.reserve("a", 1000)
    before = 0
    for computed in (100, 200, 640, 1000):
        tokens.read = 0
        manager.commit("a", tokens, computed)
        manager.check()
        assert tokens.read == (computed // PAGE_SIZE - before // PAGE_SIZE) * PAGE_SIZE
        before = computed


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128, 190])
def test_fork_copies_only_the_partial_page(length: int):
    """Guards against sharing a page that will be written, and against copying pages that hold nothing."""
    manager = CacheManager(16)
    tokens = list(range(length))
    manager.admit("a", tokens)
    compute(manager, "a", tokens)
    assert manager.reserve("a", 300)
    assert manager.fork("a", "b")
    copies = manager.take_copies()
    manager.check()
    full = length // PAGE_SIZE
    assert manager.table("b")[:full] == manager.table("a")[:full]
    if length % PAGE_SIZE:
        assert copies == Copies(pages=[(manager.table("a")[full], manager.table("b")[full])], slots=[])
    else:
        assert copies == Copies(pages=[], slots=[])
    assert not set(manager.table("a")[full:]) & set(manager.table("b"))
    manager.free("a")
    compute(manager, "b", [*tokens, *[5] * 70])


def test_fork_without_room_changes_nothing():
    """Guards against a failed fork that keeps references."""
    manager = CacheManager(3)
    run(manager, "a", [1] * 100)
    before = manager.usage
    assert not manager.fork("a", "b")
    assert manager.usage == before
    manager.check()
    compute(manager, "a", [1] * 128)
    assert manager.fork("a", "b"), "full pages need no room"
    assert manager.take_copies() == Copies(pages=[], slots=[])


def test_fork_evicts_for_its_copy():
    """Guards against a fork that is refused though a cached page could make room."""
    manager = CacheManager(3)
    run(manager, "a", [1] * 64)
    manager.free("a")
    run(manager, "b", [2] * 10)
    assert (manager.usage.pages_free, manager.usage.pages_cached) == (0, 1)
    assert manager.fork("b", "c")
    assert manager.take_copies() == Copies(pages=[(manager.table("b")[0], manager.table("c")[0])], slots=[])
    manager.check()
    assert manager.usage.pages_cached == 0


def test_slots_one_a_sequence():
    """Guards against two sequences sharing a recurrent state, and a prefix hit without one."""
    manager = CacheManager(16, slots=3, prefix_caching=False)
    tokens = [1] * 130
    assert run(manager, "a", tokens) == 0
    assert manager.can_admit()
    assert manager.fork("a", "b")
    assert manager.take_copies().slots == [(manager.slot("a"), manager.slot("b"))]
    assert {manager.slot("a"), manager.slot("b")} == {1, 2}
    before = manager.usage
    assert not manager.fork("a", "c")
    assert manager.usage == before
    assert not manager.can_admit()
    with pytest.raises(AssertionError):
        manager.admit("c", tokens)
    manager.free("a")
    assert manager.admit("c", tokens) == 0
    manager.check()


def test_no_slots():
    """Guards against a slot where no layer is recurrent."""
    manager = CacheManager(4)
    assert manager.can_admit()
    manager.admit("a", [1])
    assert manager.slot("a") is None


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 100, 128])
def test_window_keeps_what_the_next_query_sees(window: int):
    """Guards against an off-by-one: a page released too early changes results, one released too late wastes memory."""
    manager = CacheManager(8, window=window)
    manager.admit("a", [])
    for computed in range(1, 330):
        compute(manager, "a", [1] * computed)
        seen = range(max(0, computed - window + 1), computed)
        pages = {position // PAGE_SIZE for position in seen}
        table = manager.table("a")
        assert len(table) == -(-computed // PAGE_SIZE)
        kept = {number for number, page in enumerate(table) if page}
        assert kept - pages <= {computed // PAGE_SIZE}, "only the page that is being filled may be kept unseen"
        assert pages <= kept


def test_window_with_fork_and_hit():
    """Guards against releasing a window's pages twice: for the child of a fork, and for a sequence that begins with a
    hit."""
    manager = CacheManager(16, window=70)
    tokens = [1] * 300
    run(manager, "a", tokens)
    assert manager.table("a")[:3] == [0, 0, 0]
    assert manager.fork("a", "b")
    compute(manager, "b", [*tokens, *[2] * 100])
    assert manager.admit("c", tokens) == 256
    assert manager.table("c")[:2] == [0, 0]
    assert manager.table("c")[2] != 0
    for key in "abc":
        manager.free(key)
        manager.check()
    assert manager.usage.pages_in_use == 0


def test_usage_counts_shared_pages_once():
    """Guards against waste or tokens counted per sequence instead of per page."""
    manager = CacheManager(11)
    run(manager, "a", [1] * 150)
    assert manager.fork("a", "b")
    usage = manager.usage
    assert (usage.pages_total, usage.pages_in_use, usage.pages_cached, usage.pages_free) == (10, 4, 0, 6)
    assert usage.tokens_held == 128 + 22 + 22
    assert usage.waste == pytest.approx(1 - 172 / 256)
    manager.free("a")
    manager.free("b")
    usage = manager.usage
    assert (usage.pages_in_use, usage.pages_cached, usage.tokens_held, usage.waste) == (0, 2, 0, 0.0)


def test_prefix_counts_only_sequences_that_compute():
    """Guards against a hit rate inflated by a request that waits for room and asks again at every step."""
    manager = CacheManager(8)
    tokens = [1] * 100
    run(manager, "a", tokens)
    for _ in range(3):
        assert manager.admit("b", tokens) == 64
        manager.free("b")
    run(manager, "b", tokens)
    compute(manager, "b", [*tokens, 2])
    assert manager.fork("b", "c")
    compute(manager, "c", [*tokens, 3])
    assert (manager.usage.prefix_query_tokens, manager.usage.prefix_hit_tokens) == (200, 64)


def test_check_sees_a_page_indexed_under_other_tokens():
    """Guards against a check that never compares what the index says with what a sequence holds."""
    manager = CacheManager(8)
    run(manager, "a", [1] * 64 + [2] * 64)
    table = manager.table("a")
    table[0], table[1] = table[1], table[0]
    with pytest.raises(AssertionError, match="another prefix"):
        manager.check()


@pytest.mark.parametrize("lost", ["page", "slot"])
def test_counts_see_a_loss(lost: str):
    """Guards against a cheap check that cannot fail."""
    manager = CacheManager(8, slots=3)
    run(manager, "a", [1] * 100)
    manager.check_counts()
    manager.free("a")
    manager.check_counts()
    manager._pool.take(1) if lost == "page" else manager._slots.take()
    with pytest.raises(AssertionError, match="in use by nobody"):
        manager.check_counts()


def test_waste_is_small():
    """Guards against pages reserved long before they are needed: 200 random lengths waste under 4 % in all."""
    randomness = random.Random(0)
    lengths = [randomness.randint(1, 2048) for _ in range(200)]
    manager = CacheManager(1 + 200 * 2048 // PAGE_SIZE)
    for number, length in enumerate(lengths):
        tokens = list(range(length))
        assert manager.admit(number, tokens, salt=number) == 0
        assert manager.reserve(number, length)
        manager.commit(number, tokens, length)
    pages = chain.from_iterable(manager.table(number) for number in range(200))
    assert manager.usage.waste == pytest.approx(1 - sum(lengths) / (PAGE_SIZE * len(list(pages))))
    assert 0 < manager.usage.waste < 0.04


@pytest.mark.parametrize("wrong", [{"pages": 0}, {"pages": 4, "slots": -1}, {"pages": 4, "window": 0}])
def test_wrong_sizes_are_named(wrong: dict[str, int]):
    """Guards against a cache that is built from a wrong size and fails later."""
    with pytest.raises(ValueError, match=str(min(wrong.values()))):
        CacheManager(**wrong)


def test_imports_no_torch():
    """Guards against the bookkeeping pulling in torch: planning a cache must stay fast to import."""
    program = "import sys, foveal.cache; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
