"""Memory that knows who touched what, and complains where a card would fault or where warps would race."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
_NOBODY = np.iinfo(np.int64).max


class Fault(Exception):
    """An access that a card would refuse, or whose result depends on luck."""


@dataclass(frozen=True)
class Visitors:
    """Who accesses memory: of N lanes the warp, its program, and how many barriers that has passed."""

    warps: Integers
    """[N], counted over all programs."""
    programs: Integers
    epochs: Integers

    def __getitem__(self, lanes: Flags) -> "Visitors":
        """Some of them."""
        return Visitors(self.warps[lanes], self.programs[lanes], self.epochs[lanes])


class Traces:
    """The least and the greatest warp that was at each place since its program's last barrier."""

    def __init__(self, places: int, warps: int) -> None:
        """warps: of a program."""
        self._warps = warps
        self._least, self._greatest, self._epoch = np.full(places, _NOBODY), np.full(places, -1), np.zeros(places, int)

    def of_others(self, at: Integers, who: Visitors) -> Flags:
        """[N, W]: where another program has been, or another warp since the last barrier."""
        ends = self._least[at], self._greatest[at]
        elsewhere = self._elsewhere(ends, who.programs[:, None])
        others = np.logical_or(*(end != who.warps[:, None] for end in ends)) & (self._epoch[at] == who.epochs[:, None])
        return (ends[1] >= 0) & (elsewhere | others)

    def add(self, at: Integers, who: Visitors) -> None:
        """at: [N, W]"""
        flat = at.ravel()
        warps, programs, epochs = (np.broadcast_to(x[:, None], at.shape).ravel() for x in vars(who).values())
        ends = self._least[flat], self._greatest[flat]
        stale = flat[(self._epoch[flat] != epochs) & ~self._elsewhere(ends, programs)]
        self._least[stale], self._greatest[stale] = _NOBODY, -1
        np.minimum.at(self._least, flat, warps)
        np.maximum.at(self._greatest, flat, warps)
        self._epoch[flat] = epochs

    def _elsewhere(self, ends: tuple[Integers, Integers], programs: Integers) -> Flags:
        return np.logical_or(*(end // self._warps != programs for end in ends)) & (ends[1] >= 0)


class Region:
    """Bytes at consecutive addresses."""

    def __init__(self, name: str, base: int, data: Bytes, *, known: bool, granule: int, warps: int) -> None:
        """known: whether there is something to read before anything is written. granule: bytes of the narrowest access
        that is to come. warps: of a program."""
        self.name, self.base, self.data, self._granule = name, base, data, granule
        places = -(-len(data) // granule)
        self._known = np.full(places, known)
        self._writers, self._readers, self._adders = (Traces(places, warps) for _ in range(3))

    def read(self, addresses: Integers, size: int, who: Visitors) -> Bytes:
        """[N, size]"""
        at = self._places(addresses, size)
        self._refuse(at, ~self._known[at], "is read where nothing has been written")
        self._refuse(at, self._writers.of_others(at, who), "is read where another warp has written: a race")
        self._refuse(at, self._adders.of_others(at, who), "is read where another warp has added: a race")
        self._readers.add(at, who)
        return self.data[self._bytes(at)]

    def write(self, addresses: Integers, values: Bytes, who: Visitors) -> None:
        """values: [N, size]. To write what is there already is no race."""
        at = self._places(addresses, values.shape[1])
        bytes_ = self._bytes(at)
        changed = (self.data[bytes_] != values).any(1) | ~self._known[at].all(1)
        new, writers = at[changed], who[changed]
        self._refuse_others(new, writers, "written")
        self.data[bytes_], self._known[at] = values, True
        self._writers.add(at, who)
        # Within a warp some thread is the last. What threads hold alike may differ in the last bit of a sum.
        lost = (self.data[bytes_] != values).any(1)
        met = self._writers.of_others(at[lost], who[lost])
        self._refuse(at[lost], met, "is written by two warps: a race")

    def promise(self, addresses: Integers, size: int, who: Visitors) -> None:
        """A write that is under way: until it comes, nobody reads here."""
        at = self._places(addresses, size)
        self._refuse_others(at, who, "copied to")
        self._known[at] = False
        self._writers.add(at, who)

    def add(self, addresses: Integers, values: NDArray[np.generic], who: Visitors) -> None:
        """Atomically, in order of lanes; values: [N, numbers]. Others may add at the same time, not read or write."""
        at = self._places(addresses, values[0].nbytes)
        self._refuse(at, ~self._known[at], "is added to where nothing has been written")
        self._refuse(at, self._writers.of_others(at, who), "is added to where another warp has written: a race")
        self._refuse(at, self._readers.of_others(at, who), "is added to where another warp has read: a race")
        self._adders.add(at, who)
        np.add.at(self.data.view(values.dtype), self._bytes(at)[:, :: values.itemsize] // values.itemsize, values)

    def _refuse_others(self, at: Integers, who: Visitors, how: str) -> None:
        """Fault where others are or have been."""
        for traces, what in ((self._writers, "written"), (self._readers, "read"), (self._adders, "added")):
            self._refuse(at, traces.of_others(at, who), f"is {how} where another warp has {what}: a race")

    def _places(self, addresses: Integers, size: int) -> Integers:
        """[N, W]. Fault outside of the region, or where misaligned."""
        at = addresses - self.base
        self._refuse(at, (at < 0) | (at + size > len(self.data)), f"is left by {size} bytes", 1)
        self._refuse(at, addresses % size != 0, f"is misaligned for {size} bytes", 1)
        return (at // self._granule)[:, None] + np.arange(-(-size // self._granule))

    def _bytes(self, at: Integers) -> Integers:
        return (at[:, :, None] * self._granule + np.arange(self._granule)).reshape(len(at), at.shape[1] * self._granule)

    def _refuse(self, at: Integers, wrong: Flags, what: str, granule: int = 0) -> None:
        if wrong.any():
            raise Fault(f"{self.name} ({len(self.data)} bytes) {what}, at {at[wrong][0] * (granule or self._granule)}")


class SharedMemory(Region):
    """That of several programs, side by side, each with `size` bytes."""

    # Every program's begins alike, whatever an instruction's alignment.
    _STRIDE = 1024

    def __init__(self, programs: int, size: int, *, granule: int, warps: int) -> None:
        self._size, self._stride = size, -(-size // self._STRIDE) * self._STRIDE
        data = np.zeros(programs * self._stride, np.uint8)
        super().__init__("shared memory", 0, data, known=False, granule=granule, warps=warps)

    def of_program(self, programs: Integers, addresses: Integers, size: int) -> Integers:
        """Addresses [N] of N programs, of `size` bytes each, as addresses here. Fault beyond a program's memory."""
        if ((addresses < 0) | (addresses + size > self._size)).any():
            raise Fault(f"addresses {addresses.min()} to {addresses.max()} of {self._size} bytes of shared memory")
        return addresses + programs * self._stride
