"""State slots: where recurrent layers keep one fixed-size state a sequence, and snapshots of such states."""

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Iterator

from foveal.cache.prefix import PrefixNode
from foveal.config.formats import PAGE_SIZE

# How much further back each snapshot of a prompt lies than the one after it.
_SPREAD = 4


class SlotPool:
    """Hands out slots 1 to `slots` - 1 by number. Slot 0 is the null slot: it exists but nobody owns it.

    A slot that no sequence owns is free, or keeps a snapshot: the state after exactly the prefix of a node. New slots
    are free ones, then those of the snapshots that were unused the longest: a snapshot never keeps a sequence out.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = list(range(1, slots))
        """Ascending. Sequences get the lowest and snapshots the highest: slots that follow one another are read in
        place."""
        self._kept = OrderedDict[int, PrefixNode]()

    @property
    def total(self) -> int:
        """All slots but the null slot."""
        return self._slots - 1

    @property
    def kept(self) -> int:
        """Slots that keep a snapshot."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Slots that no sequence owns."""
        return len(self._free) + len(self._kept)

    def take(self) -> int:
        """A slot for a sequence; there must be one."""
        assert self.available, f"all {self.total} state slots are taken"
        return self._free.pop(0) if self._free else self._evict_oldest()

    def release(self, slot: int) -> None:
        """Give a sequence's slot back."""
        assert 0 < slot < self._slots and slot not in self._free and slot not in self._kept, f"slot {slot} is not taken"
        insort(self._free, slot)

    def keep(self, node: PrefixNode, instead_of: PrefixNode | None = None) -> int | None:
        """A slot for a snapshot of the state after `node`; its caller fills it. That of `instead_of`, where it still
        has one. None: sequences own all slots."""
        assert not node.state, f"slot {node.state} keeps that state already"
        if instead_of is not None and instead_of.state:
            slot = self._evict(instead_of.state)
        elif self._free:
            slot = self._free.pop()
        elif self._kept:
            slot = self._evict_oldest()
        else:
            return None
        node.state = slot
        self._kept[slot] = node
        return slot

    def use(self, node: PrefixNode) -> int:
        """The slot of the node's snapshot, which now is the one used last."""
        self._kept.move_to_end(node.state)
        return node.state

    def check(self, owned: Collection[int]) -> None:
        """AssertionError unless every slot but the null slot is either free, or in `owned`, or keeps the snapshot of a
        node that knows it, once."""
        assert sorted([*self._free, *self._kept, *owned]) == list(range(1, self._slots)), (self._free, owned)
        for slot, node in self._kept.items():
            assert node.state == slot, f"slot {slot} keeps a state of which the index says {node.state}"

    def _evict_oldest(self) -> int:
        return self._evict(next(iter(self._kept)))

    def _evict(self, slot: int) -> int:
        self._kept.pop(slot).state = 0
        return slot


def snapshot_lengths(length: int, known: int, restored: int) -> tuple[int, ...]:
    """At which lengths of a prompt of `length` tokens a snapshot is worth its slot, ascending: whole pages beyond the
    `restored` tokens.

    Its last page boundary but for the last token, from where it goes on when it is asked again or continued; where it
    parts from what is cached, `known` tokens: others will part there too. And further back ever more thinly: the next
    prompt may part from this one d pages before the end, where nobody knows of it yet. With snapshots 4, 16, 64, ...
    pages before the end it computes at most 4 d of the pages that they share.
    """
    last = max(0, length - 1) // PAGE_SIZE
    wanted = {known, *(PAGE_SIZE * (last - back) for back in _distances(last))}
    return tuple(sorted(one for one in wanted if one >= known and one > restored))


def _distances(most: int) -> Iterator[int]:
    yield 0
    back = _SPREAD
    while back < most:
        yield back
        back *= _SPREAD
