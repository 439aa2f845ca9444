"""The block pool: pages by id, with owners counted. It knows no tensors."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from foveal.cache.prefix import PrefixIndex


class BlockPool:
    """Hands out pages 1 to `pages` - 1. Page 0 is the null page: it exists, nobody owns it, and tables point to it
    where they have nothing.

    A page is in use (it has owners), or cached (no owner, but indexed: a prefix hit can bring it back), or free.
    New pages come from the free ones, the last released first, then from the cached ones, the longest unused first.
    """

    def __init__(self, pages: int, index: PrefixIndex) -> None:
        self._index = index
        self._owners = [0] * pages
        # Taken from the end, so the first pages go first. A dict is a stack that also gives up any element in O(1).
        self._free = dict.fromkeys(range(pages - 1, 0, -1))
        self._cached = OrderedDict[int, None]()
        self._in_use = 0

    @property
    def pages(self) -> int:
        """All pages but the null page."""
        return len(self._owners) - 1

    @property
    def free(self) -> int:
        """Pages without owner that hold nothing worth keeping."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages without owner that the prefix index knows."""
        return len(self._cached)

    @property
    def in_use(self) -> int:
        """Pages with owners."""
        return self._in_use

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return self.free + self.cached

    def take(self, count: int, after: int = 0) -> list[int]:
        """`count` pages for one owner, evicting cached ones if it must; there must be that many `available`.

        Each page follows the one before it, and the first follows `after`, where that page is free: over consecutive
        pages a kernel can use a view instead of a gather.
        """
        assert count <= self.available, f"{count} pages asked for, {self.available} available"
        taken = []
        for _ in range(count):
            after = self._take_one(after + 1)
            taken.append(after)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One owner more for pages that are in use or cached."""
        for page in pages:
            assert page in self._cached or self._owners[page] > 0, f"page {page} holds nothing to share"
            self._cached.pop(page, None)
            self._in_use += not self._owners[page]
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less, in the order given: of cached pages, the first released is evicted first."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} has no owner"
            self._owners[page] -= 1
            if not self._owners[page]:
                self._in_use -= 1
                (self._cached if page in self._index else self._free)[page] = None

    def check_counts(self) -> None:
        """AssertionError unless in use + cached + free is all pages; the time does not depend on their number."""
        assert self.in_use + self.cached + self.free == self.pages, (self.in_use, self.cached, self.free, self.pages)

    def check(self, owners: Mapping[int, int]) -> None:
        """AssertionError unless the owners of each page are as many as `owners` says, every page but the null page is
        in use, cached or free, and cached pages are indexed and free ones are not."""
        self.check_counts()
        in_use = {page: count for page, count in enumerate(self._owners) if count}
        assert in_use == dict(owners), (in_use, owners)
        assert len(in_use) == self.in_use, (in_use, self.in_use)
        everywhere = sorted([*in_use, *self._cached, *self._free])
        assert everywhere == list(range(1, self.pages + 1)), everywhere
        assert all(page in self._index for page in self._cached), self._cached
        assert not any(page in self._index for page in self._free), self._free

    def _take_one(self, wanted: int) -> int:
        if wanted in self._free:
            page = wanted
            del self._free[page]
        elif self._free:
            page, _ = self._free.popitem()
        else:
            page, _ = self._cached.popitem(last=False)
            self._index.remove(page)
        self._owners[page] = 1
        self._in_use += 1
        return page
