"""The cache manager: which pages and which state slot each sequence has. It knows no tensors."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from foveal.cache.pool import BlockPool
from foveal.cache.prefix import PrefixIndex, PrefixNode, page_tokens
from foveal.cache.slots import SlotPool, snapshot_lengths
from foveal.config.formats import PAGE_SIZE


@dataclass(frozen=True)
class Copies:
    """What the cache's owner is to copy, as (source, destination), in this order, before it writes anything else."""

    pages: list[tuple[int, int]]
    slots: list[tuple[int, int]]


@dataclass(frozen=True)
class CacheUsage:
    """How full the cache is. pages_total = pages_in_use + pages_cached + pages_free: the null page does not count."""

    pages_total: int
    pages_in_use: int
    pages_cached: int
    pages_free: int
    slots_total: int
    """Slots for recurrent states; the null slot does not count. 0: no layer is recurrent."""
    slots_in_use: int
    snapshots: int
    """Slots that keep the state after a prefix."""
    tokens_held: int
    """Computed tokens in pages in use; those of a shared page count once."""
    waste: float
    """Share, 0 to 1, of the token places in pages in use that hold no token; a shared page counts once."""
    prefix_query_tokens: int
    """Tokens that reusable sequences came with, where prefix caching is on. Counted when the sequence first commits, so
    that one that is admitted and turned away again for lack of room counts nothing."""
    prefix_hit_tokens: int
    """Those of them that were found in the cache."""


@dataclass
class _Sequence:
    table: list[int]
    node: PrefixNode | None
    """The prefix of the computed full pages; None: not indexed."""
    computed: int
    slot: int | None
    released: int = 0
    """Leading pages that the window has left behind; of these only the sinks' are still there."""
    unseen: tuple[int, int] = (0, 0)
    """Prefix query tokens and hit tokens that the first commit will count."""
    known: int = 0
    """Tokens that it came with."""
    wanted: tuple[int, ...] = ()
    """At which lengths of these a snapshot is worth a slot."""
    latest: PrefixNode | None = None
    """Whose snapshot is of no more use once there is a later one: beyond `known`, the sequence's own."""

    @property
    def full_pages(self) -> int:
        return self.computed // PAGE_SIZE

    @property
    def empty_places(self) -> int:
        return len(self.table) * PAGE_SIZE - self.computed


def most_pages(length: int, step: int, window: int | None, sinks: int = 0) -> int:
    """Pages that a sequence of `length` tokens holds at any one time, computed at most `step` tokens at a time: a
    window lets go of those behind it, but for the sinks'."""
    pages = -(-length // PAGE_SIZE)
    if window is None:
        return pages
    # One page more on either side: neither the window nor a chunk begins where a page does.
    return min(pages, -(-sinks // PAGE_SIZE) + (window + step) // PAGE_SIZE + 2)


class CacheManager:
    """Pages and slots of all sequences.

    `pages` and `slots` are what the cache's tensors hold, null page and null slot (number 0) included; slots = 0: no
    recurrent layer. `window`: a query sees itself and the window - 1 tokens before it, and the first `sinks` tokens, in
    every attention layer; pages that no query will see any more are released.

    Where there are slots, a prefix is reused up to a snapshot of the state after it. Snapshots are kept in slots that
    no sequence owns, at page boundaries that may be wanted again (`step_end`). Each sequence owns its slot: what goes
    on from another's state, or from a snapshot, gets a copy before its first step (`take_copies`).

    A page that several sequences share, or that the prefix index knows, is full and is never written again: what a
    sequence writes next always lies in pages of its own.

    Raises ValueError for pages < 1, slots < 0, window < 1 or sinks < 0.
    """

    def __init__(
        self, pages: int, slots: int = 0, *, prefix_caching: bool = True, window: int | None = None, sinks: int = 0
    ) -> None:
        if pages < 1 or slots < 0:
            raise ValueError(
                f"a cache needs at least one page and no negative number of slots, not {pages} and {slots}"
            )
        if window is not None and window < 1:
            raise ValueError(f"a window must be at least one token, not {window}")
        if sinks < 0:
            raise ValueError(f"sinks must not be negative, not {sinks}")
        self._window = window
        self._sink_pages = -(-sinks // PAGE_SIZE)
        self._index = PrefixIndex()
        self._pool = BlockPool(pages, self._index)
        self._slots = SlotPool(slots) if slots else None
        self._copies = Copies([], [])
        self._prefix_caching = prefix_caching
        self._sequences: dict[Hashable, _Sequence] = {}
        self._queried = 0
        self._hit = 0

    def can_admit(self) -> bool:
        """Whether `admit` may be called: there is a slot for another sequence, or none is needed."""
        return self._slots is None or self._slots.available > 0

    def admit(
        self, key: Hashable, tokens: Sequence[int], salt: Hashable = None, *, reusable: bool = True, pages: int = 0
    ) -> int | None:
        """Begin a sequence; returns how many of its first tokens are already cached. None where the pool lacks what it
        needs to hold `pages` at a time: then nothing has changed.

        These are whole pages, and at most len(tokens) - 1 tokens: the last token must be computed to know what follows.
        Sequences find each other's pages only under the same salt; reusable=False: this one finds none, and none finds
        its. Its pages stay its own until `free`.
        """
        assert key not in self._sequences, f"sequence {key!r} is already there"
        if not (self._prefix_caching and reusable):
            if pages > self._pool.available:
                return None
            self._sequences[key] = _Sequence(table=[], node=None, computed=0, slot=self._take_slot(None))
            return 0
        root = self._index.root(salt)
        known = self._index.match(root, tokens, limit=max(0, len(tokens) - 1) // PAGE_SIZE)
        hits = known if self._slots is None else _restorable(known)
        node = hits[-1] if hits else root
        cached = len(hits) * PAGE_SIZE
        table = [node.page for node in hits]
        self._pool.share(table)
        sequence = _Sequence(table, node, cached, None, unseen=(len(tokens), cached))
        self._slide(sequence)
        held = self._held(sequence)
        if pages - len(held) > self._pool.available:
            self._pool.release(reversed(held))
            return None
        sequence.slot = self._take_slot(node)  # the last thing: it may cost a snapshot
        if self._slots:
            sequence.known = len(tokens)
            sequence.wanted = snapshot_lengths(len(tokens), len(known) * PAGE_SIZE, cached)
        self._sequences[key] = sequence
        return cached

    def step_end(self, key: Hashable, end: int) -> int:
        """Where a step should end that could compute the sequence's tokens up to `end`: no later than that, and where a
        snapshot is wanted."""
        sequence = self._sequences[key]
        return next((length for length in sequence.wanted if sequence.computed < length < end), end)

    def reserve(self, key: Hashable, length: int) -> bool:
        """Pages for the sequence's first `length` tokens. False where the pool lacks them: then nothing has changed."""
        table = self._sequences[key].table
        missing = -(-length // PAGE_SIZE) - len(table)
        if missing > self._pool.available:
            return False
        table += self._pool.take(missing, after=table[-1] if table else 0)
        return True

    def commit(self, key: Hashable, tokens: Sequence[int], computed: int) -> None:
        """The first `computed` of the sequence's tokens are computed; `tokens` are these and maybe more.

        Pages that are now full can be hit, unless another page holds the same prefix already. Pages that the window has
        passed are released. The time is that of the new pages, not of the length.
        """
        sequence = self._sequences[key]
        assert computed <= len(tokens), (computed, len(tokens))
        assert sequence.computed <= computed <= len(sequence.table) * PAGE_SIZE, (sequence.computed, computed)
        if sequence.node is not None:
            for number in range(sequence.full_pages, computed // PAGE_SIZE):
                labels = page_tokens(tokens, number)
                sequence.node = self._index.insert(sequence.node, labels, sequence.table[number])
        sequence.computed = computed
        self._keep_state(sequence)
        self._slide(sequence)
        self._count(sequence)

    def fork(self, parent: Hashable, child: Hashable) -> bool:
        """Begin `child` with the computed tokens of `parent`. False where there is no room: then nothing has changed.

        Full pages are shared. A partly filled page and the state slot are the child's own, and copied (`take_copies`);
        what the parent reserved beyond its computed tokens stays the parent's.
        """
        assert child not in self._sequences, f"sequence {child!r} is already there"
        source = self._sequences[parent]
        partial = source.table[source.full_pages : -(-source.computed // PAGE_SIZE)]
        if len(partial) > self._pool.available or not self.can_admit():
            return False
        shared = source.table[: source.full_pages]
        self._pool.share(self._held(source, source.full_pages))
        own = self._pool.take(len(partial), after=shared[-1] if shared else 0)
        self._copies.pages.extend(zip(partial, own, strict=True))
        slot = self._slots.take() if self._slots else None
        if source.slot is not None and slot is not None:
            self._copies.slots.append((source.slot, slot))
        self._sequences[child] = replace(source, table=shared + own, slot=slot, unseen=(0, 0), latest=None)
        return True

    def take_copies(self) -> Copies:
        """What is to be copied since the last call, before anything else is written: what forks do not share, states
        from which sequences go on, and snapshots of those that steps have left in the sequences' slots."""
        copies, self._copies = self._copies, Copies([], [])
        return copies

    def give_back(self, copies: Copies) -> None:
        """What of `take_copies` was not done: it comes first the next time."""
        self._copies.pages[:0] = copies.pages
        self._copies.slots[:0] = copies.slots

    def free(self, key: Hashable) -> None:
        """End a sequence. Its full pages stay cached, the last one to be evicted first."""
        sequence = self._sequences.pop(key)
        self._pool.release(reversed(self._held(sequence)))
        if self._slots and sequence.slot is not None:
            self._slots.release(sequence.slot)

    def table(self, key: Hashable) -> list[int]:
        """The sequence's pages: token n is in page table[n // PAGE_SIZE]; 0 where the window has passed all but sinks.

        The manager's own list: it grows later, and the caller only reads it.
        """
        return self._sequences[key].table

    def slot(self, key: Hashable) -> int | None:
        """The sequence's state slot; None where there are no slots."""
        return self._sequences[key].slot

    @property
    def available(self) -> int:
        """Pages that `reserve` can give: free ones and cached ones."""
        return self._pool.available

    @property
    def usage(self) -> CacheUsage:
        """How full the cache is now."""
        places = self._pool.in_use * PAGE_SIZE
        # Only a sequence's last pages have empty places, and those are never shared.
        empty = sum(sequence.empty_places for sequence in self._sequences.values())
        return CacheUsage(
            pages_total=self._pool.pages,
            pages_in_use=self._pool.in_use,
            pages_cached=self._pool.cached,
            pages_free=self._pool.free,
            slots_total=self._slots.total if self._slots else 0,
            slots_in_use=self._slots.total - self._slots.available if self._slots else 0,
            snapshots=self._slots.kept if self._slots else 0,
            tokens_held=places - empty,
            waste=empty / places if places else 0.0,
            prefix_query_tokens=self._queried,
            prefix_hit_tokens=self._hit,
        )

    def check_counts(self) -> None:
        """AssertionError unless in use + cached + free is all pages, and without sequences nothing is in use: from the
        counts alone, so that it can run at any time."""
        self._pool.check_counts()
        if not self._sequences:
            assert not self._pool.in_use, f"{self._pool.in_use} pages are in use by nobody"
            assert not self._slots or self._slots.available == self._slots.total, "a slot is in use by nobody"

    def check(self) -> None:
        """AssertionError unless every page is in use, cached or free, the owners counted are those in the tables, the
        index knows each page by the prefix that its sequence has there, and every slot is free, has one owner, or keeps
        one snapshot."""
        self.check_counts()
        sequences = self._sequences.values()
        self._index.check()
        self._pool.check(Counter(page for sequence in sequences for page in self._held(sequence)))
        if self._slots:
            self._slots.check([sequence.slot for sequence in sequences if sequence.slot is not None])
        for sequence in sequences:
            self._check_sequence(sequence)

    def _take_slot(self, node: PrefixNode | None) -> int | None:
        """A slot for a sequence that goes on from the node's snapshot, if it has one."""
        if self._slots is None:
            return None
        snapshot = self._slots.use(node) if node is not None and node.state else 0
        slot = self._slots.take()
        if snapshot not in (0, slot):  # equal where there was no other: then the sequence takes the state over
            self._copies.slots.append((snapshot, slot))
        return slot

    def _keep_state(self, sequence: _Sequence) -> None:
        """Keep a snapshot of the state, if it is wanted: where `admit` said, and beyond, at the last page boundary of
        all."""
        node, slot, computed = sequence.node, sequence.slot, sequence.computed
        if self._slots is None or node is None or slot is None or not computed or computed % PAGE_SIZE:
            return
        grown = computed >= sequence.known
        if node.state:
            self._slots.use(node)
        elif grown or computed in sequence.wanted:
            snapshot = self._slots.keep(node, sequence.latest if grown else None)
            if snapshot is not None:
                self._copies.slots.append((slot, snapshot))
                sequence.latest = node if grown else None

    def _held(self, sequence: _Sequence, stop: int | None = None) -> list[int]:
        """The pages of the sequence's table, or of its first `stop` entries, that it owns."""
        sinks = min(self._sink_pages, sequence.released)
        return sequence.table[:sinks] + sequence.table[sequence.released : stop]

    def _slide(self, sequence: _Sequence) -> None:
        """Release pages that lie wholly between sinks and window: the next query, at position `computed`, and all after
        it see nothing else at or before computed - window."""
        if self._window is None:
            return
        passed = max(0, sequence.computed - self._window + 1) // PAGE_SIZE
        leaving = range(max(sequence.released, self._sink_pages), passed)
        self._pool.release(sequence.table[number] for number in reversed(leaving))
        for number in leaving:
            sequence.table[number] = 0
        sequence.released = max(passed, sequence.released)

    def _count(self, sequence: _Sequence) -> None:
        queried, hit = sequence.unseen
        self._queried += queried
        self._hit += hit
        sequence.unseen = (0, 0)

    def _check_sequence(self, sequence: _Sequence) -> None:
        assert sequence.empty_places >= 0, sequence
        gone = range(self._sink_pages, sequence.released)
        assert [page == 0 for page in sequence.table] == [n in gone for n in range(len(sequence.table))]
        assert not any(page in self._index for page in sequence.table[sequence.full_pages :]), sequence.table
        node = sequence.node
        if node is None:
            return
        for page in reversed(sequence.table[: sequence.full_pages]):
            assert self._index.node(page) in (None, node), f"page {page} is indexed as another prefix"
            assert node is not None and node.parent is not None, "fewer prefix nodes than full pages"
            node = node.parent
        assert node.parent is None, "more prefix nodes than full pages"


def _restorable(nodes: list[PrefixNode]) -> list[PrefixNode]:
    """The prefixes up to the longest of them after which there is a snapshot."""
    return nodes[: max((number for number, node in enumerate(nodes, 1) if node.state), default=0)]
