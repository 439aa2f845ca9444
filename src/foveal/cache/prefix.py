"""The prefix index: which page holds the keys and values of which tokens after which prefix.

What a page holds depends on its own tokens and on all tokens before them, so a page is found by its parent and its
tokens. The parent is a node of this index and not a hash of one, and the dictionary compares tokens whose hashes are
equal: two prefixes can share a hash and are still told apart.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from foveal.config.formats import PAGE_SIZE


@dataclass(eq=False, slots=True, weakref_slot=True)
class PrefixNode:
    """One prefix of whole pages: the parent's, then one page more."""

    parent: "PrefixNode | None"
    label: Hashable
    """The page's PAGE_SIZE tokens; the salt in a root, which stands for the empty prefix."""
    page: int = 0
    """The page that holds it; 0, the null page: none does (any more)."""
    state: int = 0
    """The slot that keeps the recurrent state after it; 0, the null slot: none does (any more)."""


class PrefixIndex:
    """A tree of prefixes, one root a salt.

    A node lives as long as something can still need it: its page, a snapshot, a child, or a sequence that will grow
    from it. Weak references see to that. So a page whose parent was evicted is found again once the parent is back.
    """

    def __init__(self) -> None:
        self._nodes = WeakValueDictionary[tuple[PrefixNode | None, Hashable], PrefixNode]()
        self._of_page: dict[int, PrefixNode] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._of_page

    def root(self, salt: Hashable) -> PrefixNode:
        """The empty prefix. Prefixes under different salts never match."""
        return self._node(None, salt)

    def match(self, root: PrefixNode, tokens: Sequence[int], limit: int) -> list[PrefixNode]:
        """The longest run of indexed pages, at most `limit`, that hold the first tokens of `tokens`."""
        nodes: list[PrefixNode] = []
        parent = root
        for number in range(limit):
            node = self._nodes.get((parent, page_tokens(tokens, number)))
            if node is None or not node.page:
                break
            nodes.append(node)
            parent = node
        return nodes

    def insert(self, parent: PrefixNode, tokens: tuple[int, ...], page: int) -> PrefixNode:
        """The node of the prefix `parent` + `tokens`. `page` holds it, unless another page already does."""
        assert len(tokens) == PAGE_SIZE and page not in self
        node = self._node(parent, tokens)
        if not node.page:
            node.page = page
            self._of_page[page] = node
        return node

    def remove(self, page: int) -> None:
        """Forget what `page` holds."""
        self._of_page.pop(page).page = 0

    def node(self, page: int) -> PrefixNode | None:
        """The prefix that ends with `page`; None where the page is not indexed."""
        return self._of_page.get(page)

    def check(self) -> None:
        """AssertionError unless every indexed page is the page of a node that can be found."""
        for page, node in self._of_page.items():
            assert node.page == page != 0, (page, node.page)
            assert self._nodes.get((node.parent, node.label)) is node, f"page {page} cannot be found"
        assert sum(node.page != 0 for node in self._nodes.values()) == len(self._of_page)

    def _node(self, parent: PrefixNode | None, label: Hashable) -> PrefixNode:
        node = self._nodes.get((parent, label))
        if node is None:
            node = self._nodes[parent, label] = PrefixNode(parent, label)
        return node


def page_tokens(tokens: Sequence[int], number: int) -> tuple[int, ...]:
    """The tokens of page `number` of a sequence."""
    return tuple(tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
