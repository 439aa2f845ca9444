"""Snapshots of recurrent states: where they are taken, how long they stay, who may go on from them."""

import pytest

from foveal.cache import PAGE_SIZE, CacheManager
from foveal.cache.slots import snapshot_lengths


def serve(manager: CacheManager, key: str, tokens: list[int], salt: str | None = None, *, prompt: int = 0) -> int:
    """Admit the first `prompt` tokens (0: all), compute all as the engine would, the rest one by one; the hit."""
    prompt = prompt or len(tokens)
    hit = computed = manager.admit(key, tokens[:prompt], salt)
    while computed < len(tokens):
        computed = manager.step_end(key, prompt) if computed < prompt else computed + 1
        assert manager.reserve(key, computed)
        manager.commit(key, tokens, computed)
    manager.check()
    return hit


def pages(*labels: int) -> list[int]:
    """A page of each of these tokens."""
    return [label for label in labels for _ in range(PAGE_SIZE)]


@pytest.mark.parametrize(
    ("pages_and_rest", "known", "restored", "expected"),
    [
        ((0, 0), 0, 0, []),
        ((0, 63), 0, 0, []),
        ((1, 0), 0, 0, []),
        ((1, 1), 0, 0, [1]),
        ((4, 1), 0, 0, [4]),
        ((5, 0), 0, 0, [4]),
        ((5, 1), 0, 0, [1, 5]),
        ((20, 5), 0, 0, [4, 16, 20]),
        ((129, 0), 0, 0, [64, 112, 124, 128]),
        ((129, 0), 10, 0, [10, 64, 112, 124, 128]),
        ((129, 0), 70, 64, [70, 112, 124, 128]),
        ((129, 0), 64, 64, [112, 124, 128]),
        ((129, 0), 128, 112, [128]),
        ((129, 0), 128, 128, []),
    ],
)
def test_which_lengths(pages_and_rest: tuple[int, int], known: int, restored: int, expected: list[int]) -> None:
    """Guards against a snapshot at every page, at none that is reused, and where one is or nobody will part."""
    whole, rest = pages_and_rest
    lengths = snapshot_lengths(whole * PAGE_SIZE + rest, known * PAGE_SIZE, restored * PAGE_SIZE)
    assert lengths == tuple(PAGE_SIZE * length for length in expected)


@pytest.mark.parametrize("apart", [0, 1, 3, 4, 7, 30, 60])
def test_the_second_prompt_computes_little_more_than_its_own(apart: int) -> None:
    """Guards against a first prompt that leaves no snapshot near where the second parts from it, `apart` pages before
    the last page boundary; the third parts there again, and goes on from exactly there."""
    manager = CacheManager(500, slots=20)
    shared = pages(*range(100))
    one, two, three = (shared + [token] * (apart * PAGE_SIZE + 5) for token in (-1, -2, -3))
    assert serve(manager, "one", one) == 0
    hit = serve(manager, "two", two)
    assert len(shared) - hit <= 3 * apart * PAGE_SIZE
    assert serve(manager, "three", three) == len(shared)


def test_a_conversation_goes_on_from_its_last_page() -> None:
    """Guards against answers whose every page keeps a snapshot, and against turns that compute them again."""
    manager = CacheManager(100, slots=5)
    turn = pages(1, 2) + [3] * 10
    for number, expected in enumerate([0, 5, 9]):
        prompt = [*turn, *([] if not number else pages(0)), number]
        turn = prompt + [4] * (3 * PAGE_SIZE)
        assert serve(manager, str(number), turn, prompt=len(prompt)) // PAGE_SIZE == expected
        manager.free(str(number))
        assert manager.usage.snapshots <= 2 * (number + 1)


def test_a_snapshot_goes_and_pages_stay() -> None:
    """Guards against a hit on pages whose state is gone, against one that gives up all where an earlier snapshot is
    left, and against slots that a sequence cannot have because of snapshots."""
    manager = CacheManager(100, slots=4)
    tokens = [*pages(*range(5)), 1]
    serve(manager, "a", tokens)
    manager.free("a")
    assert (manager.usage.snapshots, manager.usage.pages_cached) == (2, 5)
    for key in ("b", "c"):
        manager.admit(key, [7])
    assert (manager.usage.snapshots, manager.usage.pages_cached) == (1, 5)
    assert serve(manager, "d", tokens) == 5 * PAGE_SIZE
    assert manager.usage.snapshots == 0 and not manager.can_admit()
    for key in ("b", "c", "d"):
        manager.free(key)
    assert manager.admit("e", tokens) == 0 and manager.usage.pages_cached == 5
    assert manager.step_end("e", len(tokens)) == 5 * PAGE_SIZE, "all is known but the state"


def test_the_last_used_stays() -> None:
    """Guards against evicting the snapshot of the prefix that everyone shares."""
    manager = CacheManager(100, slots=4)
    shared = [*pages(1), 0]
    serve(manager, "first", shared)
    manager.free("first")
    for number in range(2, 9):
        other = [*pages(number), 0]
        assert serve(manager, "other", other) == 0
        manager.free("other")
        assert serve(manager, "again", shared) == PAGE_SIZE
        manager.free("again")


def test_salts_keep_states_apart() -> None:
    """Guards against one tenant's request going on from another's state."""
    manager = CacheManager(100, slots=9)
    tokens = [*pages(1, 2), 0]
    hits = [serve(manager, str(number), tokens, salt) for number, salt in enumerate([None, "a", "a", "b", None])]
    assert hits == [0, 0, 128, 0, 128]


def test_a_snapshot_waits_for_its_pages() -> None:
    """Guards against going on from a state whose pages are evicted."""
    manager = CacheManager(4, slots=6)
    tokens = [*pages(1, 2), 0]
    serve(manager, "a", tokens)
    manager.free("a")
    serve(manager, "b", [*pages(8, 9), 7])
    manager.free("b")
    assert manager.usage.snapshots == 2
    assert serve(manager, "a", tokens) == 0
    manager.free("a")
    assert serve(manager, "a", tokens) == 128


def test_not_reusable_leaves_no_snapshot() -> None:
    """Guards against states kept for sequences, or caches, that share nothing."""
    tokens = [*pages(1, 2), 0]
    for manager, reusable in ((CacheManager(9, 9), False), (CacheManager(9, 9, prefix_caching=False), True)):
        manager.admit("a", tokens, reusable=reusable)
        assert manager.step_end("a", 129) == 129
        for computed in (64, 128, 129):
            assert manager.reserve("a", computed)
            manager.commit("a", tokens, computed)
        assert manager.usage.snapshots == 0 and manager.take_copies().slots == []


def test_copies_come_in_the_order_of_what_they_read() -> None:
    """Guards against a snapshot that is copied after its slot was given to another sequence."""
    manager = CacheManager(20, slots=4)
    tokens = [*pages(1), 0]
    serve(manager, "a", tokens)
    manager.free("a")
    content = dict.fromkeys(range(4), "")
    (pair,) = manager.take_copies().slots
    content[pair[1]] = "state"
    for key in "bcd":
        assert manager.admit(key, tokens) == PAGE_SIZE, "the last one takes the snapshot's own slot"
    for source, destination in manager.take_copies().slots:
        content[destination] = content[source]
    assert all(content[manager.slot(key) or 0] == "state" for key in "bcd")
    assert manager.usage.snapshots == 0


def test_who_is_turned_away_costs_no_snapshot() -> None:
    """Guards against a request without room for its pages that takes the slot of the snapshot which it wants."""
    manager = CacheManager(12, slots=3)
    tokens = [*pages(1, 2), 0]
    serve(manager, "a", tokens)
    manager.free("a")
    serve(manager, "b", [7])
    before = manager.usage
    assert before.snapshots == 1
    assert manager.admit("c", tokens, pages=11) is None
    assert manager.usage == before
    assert manager.admit("c", tokens, pages=4) == 128


def test_sequences_own_neighbouring_slots() -> None:
    """Guards against snapshots in between, for states that follow one another are read without a copy."""
    manager = CacheManager(100, slots=30)
    for number in range(6):
        serve(manager, str(number), [*pages(number, 8, 9), 0])
    assert manager.usage.snapshots >= 6
    assert sorted(manager.slot(str(number)) or 0 for number in range(6)) == [1, 2, 3, 4, 5, 6]


def test_two_snapshots_of_one_step() -> None:
    """Guards against copies out of order, where the second sequence's state takes the place of the first one's."""
    manager = CacheManager(20, slots=4)
    prompts = {"a": [*pages(1), 0], "b": [*pages(2), 0]}
    for key, tokens in prompts.items():
        manager.admit(key, tokens)
        assert manager.reserve(key, PAGE_SIZE)
    for key, tokens in prompts.items():
        manager.commit(key, tokens, PAGE_SIZE)
    own, (snapshot,) = [manager.slot(key) for key in prompts], {1, 2, 3} - {manager.slot(key) for key in prompts}
    assert manager.take_copies().slots == [(own[0], snapshot), (own[1], snapshot)]
    assert manager.admit("c", prompts["b"]) == PAGE_SIZE
    manager.free("c")
    assert manager.admit("d", prompts["a"]) == 0
