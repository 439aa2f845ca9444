"""The cache manager under random use, against a model that keeps what every page and slot really holds.

The model plays the engine: it writes tokens into pages through the tables, leaves the state of a sequence in its slot,
copies what it is told to before it writes, and reads every sequence and every snapshot back after every step. It knows
by brute force which pages can be hit, and by the copies where snapshots are.
"""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from foveal.cache import PAGE_SIZE, CacheManager, Copies

# hash((-1,) * 64) == hash((-2,) * 64) in CPython: pages of these two tokens collide in the index without any help.
TOKENS = (-1, -2, 3)
assert hash((-1,) * PAGE_SIZE) == hash((-2,) * PAGE_SIZE)

MAX_TOKENS = 6 * PAGE_SIZE
tails = st.integers(0, PAGE_SIZE - 1) | st.just(0)
prompts = st.tuples(
    st.lists(st.sampled_from(TOKENS), max_size=3), tails, st.sampled_from(TOKENS)
)  # whole pages of one token each, and a tail
salts = st.sampled_from([None, "salt"])
reuse = st.sampled_from([True, True, True, False])
counts = st.sampled_from([1, 7, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE + 5])

Prefix = tuple[str | None, tuple[int, ...]]


@dataclass
class ModelSequence:
    """What the engine knows of a request."""

    salt: str | None
    tokens: list[int]
    """All tokens, computed or not."""
    computed: int
    queried: int
    hit: int
    reusable: bool


@dataclass
class Memory:
    """What pages and slots really hold."""

    pages: dict[int, list[int | None]] = field(default_factory=dict)
    slots: dict[int, list[int]] = field(default_factory=dict)
    """All tokens that a state knows."""

    def write(self, page: int, place: int, token: int) -> None:
        self.pages.setdefault(page, [None] * PAGE_SIZE)[place] = token

    def read(self, page: int, place: int) -> int | None:
        return self.pages.get(page, [None] * PAGE_SIZE)[place]

    def copy(self, copies: Copies) -> None:
        for source, destination in copies.pages:
            self.pages[destination] = list(self.pages[source])
        for source, destination in copies.slots:
            self.slots[destination] = list(self.slots.get(source, []))


class CacheMachine(RuleBasedStateMachine):
    keys = Bundle("keys")

    @initialize(
        pages=st.integers(2, 10),
        slots=st.sampled_from([0, 0, 0, 2, 3, 4, 6, 8]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        window=st.sampled_from([None, None, None, 1, 40, 64, 100, 129]),
        sinks=st.sampled_from([0, 0, 1, 4, 64, 70]),
    )
    def start(self, pages: int, slots: int, prefix_caching: bool, window: int | None, sinks: int) -> None:
        self.manager = CacheManager(pages, slots, prefix_caching=prefix_caching, window=window, sinks=sinks)
        self.pages, self.slots, self.window, self.sinks = pages, slots, window, sinks
        self.caches = prefix_caching
        self.memory = Memory()
        self.sequences: dict[int, ModelSequence] = {}
        self.indexed: dict[Prefix, int] = {}
        self.snapshots: dict[Prefix, int] = {}
        self.past: list[tuple[str | None, list[int]]] = []
        self.queried = self.hit = self.next_key = 0

    # What the engine does.

    @precondition(lambda self: self.manager.can_admit())
    @rule(target=keys, prompt=prompts, salt=salts, reusable=reuse)
    def admit(self, prompt: tuple[list[int], int, int], salt: str | None, reusable: bool) -> int:
        return self._admit(_tokens(prompt), salt, reusable)

    @precondition(lambda self: self.manager.can_admit())
    @rule(prompt=prompts, salt=salts, count=counts, output=st.integers(0, PAGE_SIZE))
    def serve(self, prompt: tuple[list[int], int, int], salt: str | None, count: int, output: int) -> None:
        """A whole request, with the others standing still."""
        key = self._admit(_tokens(prompt), salt, True)
        self.catch_up(key, count)
        for _ in range(output):
            self.append(key, 1, 3, 0)
        self.free(key)

    @precondition(lambda self: self.past and self.manager.can_admit())
    @rule(target=keys, data=st.data(), aligned=st.booleans(), reusable=reuse)
    def admit_again(self, data: st.DataObject, aligned: bool, reusable: bool) -> int:
        """A preempted or repeated request; where `aligned`, a prompt of whole pages which may be cached to its end."""
        salt, tokens = data.draw(st.sampled_from(self.past))
        return self._admit(tokens[: len(tokens) // PAGE_SIZE * PAGE_SIZE] if aligned else tokens, salt, reusable)

    @rule(key=keys, count=counts, token=st.sampled_from(TOKENS), rejected=st.integers(0, 3))
    def append(self, key: int, count: int, token: int, rejected: int) -> None:
        """A step: what is left of the prompt, or new tokens, of which the last ones may be rejected (speculation)."""
        self._step([key], count, token, rejected)

    @rule(first=keys, second=keys, count=counts, token=st.sampled_from(TOKENS))
    def append_to_two(self, first: int, second: int, count: int, token: int) -> None:
        """One step of two sequences: everything is written before anything is committed."""
        self._step(list({first: None, second: None}), count, token, 0)

    @rule(key=keys, count=counts)
    def catch_up(self, key: int, count: int) -> None:
        """Steps until all that the sequence knows is computed, or pages are lacking."""
        sequence, before = self.sequences[key], -1
        while before < sequence.computed < len(sequence.tokens):
            before = sequence.computed
            self.append(key, count, 3, 0)

    @rule(key=keys, length=st.integers(0, MAX_TOKENS))
    def reserve_only(self, key: int, length: int) -> None:
        self._reserve(key, length)

    @rule(target=keys, parent=keys)
    def fork(self, parent: int) -> int | MultipleResults[int]:
        child, source = self._new_key(), self.sequences[parent]
        partial = source.computed % PAGE_SIZE != 0
        before, usage = self._tables(), self.manager.usage
        room = (not partial or usage.pages_free + usage.pages_cached > 0) and self.manager.can_admit()
        forked = self.manager.fork(parent, child)
        assert forked == room
        if not forked:
            assert (self._tables(), self.manager.usage) == (before, usage)
            return multiple()
        tokens = source.tokens[: source.computed]
        self.sequences[child] = ModelSequence(source.salt, tokens, source.computed, 0, 0, source.reusable)
        self._slot_taken(child)
        own = [page for page in self.manager.table(child) if page not in self.manager.table(parent)]
        assert len(own) == partial
        self._taken(own, usage.pages_free)
        return child

    @rule(key=consumes(keys))
    def free(self, key: int) -> None:
        sequence = self.sequences.pop(key)
        self.past.append((sequence.salt, sequence.tokens))
        self.manager.free(key)

    # What must hold at all times.

    @invariant()
    def books_are_right(self) -> None:
        self.manager.check()

    @invariant()
    def everything_reads_back(self) -> None:
        memory = deepcopy(self.memory)
        memory.copy(self.manager._copies)  # as the next step will find it
        for (_, tokens), slot in self.snapshots.items():
            assert memory.slots[slot] == list(tokens), "a snapshot is the state of another prefix"
        for key, sequence in self.sequences.items():
            table = self.manager.table(key)
            first = 0 if self.window is None else max(0, sequence.computed - self.window + 1)
            sinks = range(min(self.sinks, first))
            for position in (*sinks, *range(first, sequence.computed)):
                page = table[position // PAGE_SIZE]
                assert page != 0, f"position {position} is still seen and has no page"
                assert memory.read(page, position % PAGE_SIZE) == sequence.tokens[position]
            gone = table[-(-self.sinks // PAGE_SIZE) : first // PAGE_SIZE]
            assert not any(gone), "a page that no query sees is kept"
            if self.slots and sequence.computed:
                slot = self.manager.slot(key)
                assert slot is not None
                assert memory.slots[slot] == sequence.tokens[: sequence.computed]

    @invariant()
    def pages_are_conserved(self) -> None:
        usage, owners = self.manager.usage, self._owners()
        assert all(0 < page < self.pages for page in owners)
        assert usage.pages_total == self.pages - 1
        assert usage.pages_total == usage.pages_in_use + usage.pages_cached + usage.pages_free
        assert usage.pages_in_use == len(owners)
        assert usage.pages_cached == len(set(self.indexed.values()) - set(owners))

    @invariant()
    def usage_is_that_of_the_pages(self) -> None:
        held: dict[int, int] = {}
        for key, sequence in self.sequences.items():
            for number, page in enumerate(self.manager.table(key)):
                if page:
                    held[page] = min(PAGE_SIZE, max(0, sequence.computed - number * PAGE_SIZE))
        usage, places = self.manager.usage, PAGE_SIZE * len(held)
        assert usage.tokens_held == sum(held.values())
        assert abs(usage.waste * places - (places - usage.tokens_held)) < 1e-6
        assert (usage.prefix_query_tokens, usage.prefix_hit_tokens) == (self.queried, self.hit)

    @invariant()
    def slots_have_one_owner(self) -> None:
        slots = [self.manager.slot(key) for key in self.sequences]
        usage = self.manager.usage
        assert (usage.slots_total, usage.snapshots) == (max(0, self.slots - 1), len(self.snapshots))
        if self.slots:
            assert len({*slots, *self.snapshots.values()}) == len(slots) + len(self.snapshots)
            assert usage.slots_in_use == len(slots)
            assert all(slot is not None and 0 < slot < self.slots for slot in slots)
            assert self.manager.can_admit() == (len(slots) < self.slots - 1)
        else:
            assert set(slots) <= {None}

    # The model's own work.

    def _step(self, keys: list[int], count: int, token: int, rejected: int) -> None:
        computed = {}
        for key in keys:
            sequence = self.sequences[key]
            pending = sequence.tokens[sequence.computed :][:count]
            new = pending or [token] * min(count, MAX_TOKENS - sequence.computed)
            new = new[: self.manager.step_end(key, sequence.computed + len(new)) - sequence.computed]
            if not self._reserve(key, sequence.computed + len(new)):
                continue
            self._write(key, sequence.computed, new)
            kept = len(new) if pending else max(0, len(new) - rejected)
            if not pending:
                sequence.tokens += new[:kept]
            computed[key] = sequence.computed + kept
        for key, length in computed.items():
            self._commit(key, length)

    def _admit(self, tokens: list[int], salt: str | None, reusable: bool) -> int:
        key = self._new_key()
        expected = self._cached_pages(tokens, salt) if reusable else []
        while self.slots and expected and (salt, tuple(tokens[: len(expected) * PAGE_SIZE])) not in self.snapshots:
            expected.pop()
        hit = self.manager.admit(key, tokens, salt, reusable=reusable)
        assert hit == len(expected) * PAGE_SIZE
        assert hit < len(tokens) or not tokens, "nothing is left to compute"
        for page, actual in zip(expected, self.manager.table(key), strict=True):
            assert actual in (0, page)
        self.sequences[key] = ModelSequence(salt, list(tokens), hit, len(tokens), hit, reusable)
        self._slot_taken(key)
        return key

    def _slot_taken(self, key: int) -> None:
        """A sequence was given a slot: what snapshot it kept is gone, and only if it had to be."""
        if not self.slots:
            return
        evicted = [prefix for prefix, slot in self.snapshots.items() if slot == self.manager.slot(key)]
        full = len(self.sequences) - 1 + len(self.snapshots) == self.slots - 1
        assert len(evicted) == full, "evicted though a slot was free"
        for prefix in evicted:
            del self.snapshots[prefix]

    def _cached_pages(self, tokens: list[int], salt: str | None) -> list[int]:
        pages: list[int] = []
        if not self.caches:
            return pages
        for end in range(PAGE_SIZE, len(tokens), PAGE_SIZE):
            page = self.indexed.get((salt, tuple(tokens[:end])))
            if page is None:
                break
            pages.append(page)
        return pages

    def _reserve(self, key: int, length: int) -> bool:
        before, usage = list(self.manager.table(key)), self.manager.usage
        missing = -(-length // PAGE_SIZE) - len(before)
        enough = self.manager.reserve(key, length)
        table = self.manager.table(key)
        assert enough == (missing <= usage.pages_free + usage.pages_cached)
        if not enough:
            assert (table, self.manager.usage) == (before, usage)
            return False
        assert table[: len(before)] == before
        assert len(table) == max(len(before), -(-length // PAGE_SIZE))
        self._taken(table[len(before) :], usage.pages_free)
        return True

    def _taken(self, pages: list[int], free: int) -> None:
        """`pages` were handed out anew: what was cached in them is gone, and only as much as was needed."""
        evicted = [prefix for prefix, page in self.indexed.items() if page in pages]
        assert len(evicted) == max(0, len(pages) - free), "evicted though pages were free, or free pages were indexed"
        for prefix in evicted:
            del self.indexed[prefix]

    def _write(self, key: int, start: int, tokens: list[int]) -> None:
        self.memory.copy(self.manager.take_copies())
        owners, cached = self._owners(), set(self.indexed.values())
        table = self.manager.table(key)
        for position, token in enumerate(tokens, start):
            page = table[position // PAGE_SIZE]
            assert owners[page] == 1, f"page {page} is written and has {owners[page]} owners"
            assert page not in cached, f"page {page} is written and can be hit"
            self.memory.write(page, position % PAGE_SIZE, token)

    def _commit(self, key: int, computed: int) -> None:
        sequence, table = self.sequences[key], list(self.manager.table(key))
        for number in range(sequence.computed // PAGE_SIZE, computed // PAGE_SIZE):
            prefix = sequence.salt, tuple(sequence.tokens[: (number + 1) * PAGE_SIZE])
            if self.caches and sequence.reusable:
                self.indexed.setdefault(prefix, table[number])
        slot = self.manager.slot(key)
        if slot is not None:
            self.memory.slots[slot] = sequence.tokens[:computed]
        before = len(self.manager._copies.slots)
        self.manager.commit(key, sequence.tokens, computed)
        for source, snapshot in self.manager._copies.slots[before:]:
            assert source == slot and self.caches and sequence.reusable and computed % PAGE_SIZE == 0
            self.snapshots = {prefix: kept for prefix, kept in self.snapshots.items() if kept != snapshot}
            self.snapshots[sequence.salt, tuple(sequence.tokens[:computed])] = snapshot
        sequence.computed = computed
        if self.caches and sequence.reusable:
            self.queried += sequence.queried
            self.hit += sequence.hit
        sequence.queried = sequence.hit = 0

    def _tables(self) -> dict[int, list[int]]:
        return {key: list(self.manager.table(key)) for key in self.sequences}

    def _owners(self) -> Counter[int]:
        return Counter(page for key in self.sequences for page in self.manager.table(key) if page)

    def _new_key(self) -> int:
        self.next_key += 1
        return self.next_key


def _tokens(prompt: tuple[list[int], int, int]) -> list[int]:
    labels, tail, token = prompt
    return [label for label in labels for _ in range(PAGE_SIZE)] + [token] * tail


CacheMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestCacheMachine = CacheMachine.TestCase
"""Guards against lost or doubly owned pages and slots, pages shared while written, wrong prefix hits, snapshots of
another state than their prefix's, and prompts of which a hit leaves nothing to compute."""
