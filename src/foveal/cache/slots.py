"""State slots: where recurrent layers keep one fixed-size state a sequence."""

from collections.abc import Collection


class SlotPool:
    """Hands out slots 1 to `slots` - 1 by number. Slot 0 is the null slot: it exists but nobody owns it."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = list(range(slots - 1, 0, -1))

    @property
    def total(self) -> int:
        """All slots but the null slot."""
        return self._slots - 1

    @property
    def free(self) -> int:
        """Slots that nobody owns."""
        return len(self._free)

    def take(self) -> int:
        """A free slot; there must be one."""
        assert self._free, f"all {self._slots - 1} state slots are taken"
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert 0 < slot < self._slots and slot not in self._free, f"slot {slot} is not taken"
        self._free.append(slot)

    def check(self, owned: Collection[int]) -> None:
        """AssertionError unless every slot but the null slot is either free or in `owned`, once."""
        assert sorted([*self._free, *owned]) == list(range(1, self._slots)), (self._free, owned)
