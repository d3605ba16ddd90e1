"""Which sequence holds which page of a paged cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .arguments import count


class _Node:
    """A page whose tokens are known, below the page of the tokens before them."""

    def __init__(self, parent: _Node | None, tokens: tuple[int, ...], page: int) -> None:
        self.parent, self.tokens, self.page = parent, tokens, page
        self.children: dict[tuple[int, ...], _Node] = {}
        self.users = 0


class HeldPages:
    """The pages of one sequence, in order: shared ones whose tokens are known, then its own."""

    def __init__(self) -> None:
        self.shared: list[_Node] = []
        self.own: list[int] = []

    @property
    def ids(self) -> list[int]:
        return [node.page for node in self.shared] + self.own


class PagePool:
    """Hands out pages, and finds those that hold the beginning of a sequence already.

    The known pages form a tree by their tokens. A page that nobody uses stays in it until its
    memory is needed, the one unused for longest going first.

    Attributes:
        num_pages, page_size: pages there are, and tokens in each.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = count("num_pages", num_pages)
        self.page_size = count("page_size", page_size)
        self._free = list(range(num_pages - 1, -1, -1))
        self._root = _Node(None, (), -1)
        # Who releases a page has released those below it just before, so children come first
        # and the oldest is always a leaf.
        self._idle: OrderedDict[_Node, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens fill."""
        return -(-tokens // self.page_size)

    def acquire(self, tokens: Sequence[int], capacity: int) -> HeldPages | None:
        """Pages for `capacity` tokens that begin with `tokens`; None if there are too few.

        The pages found known are the first ones; the last of `tokens` is never in one of them,
        because what follows it has to be computed.
        """
        held, node = HeldPages(), self._root
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            child = node.children.get(tuple(tokens[start : start + self.page_size]))
            if child is None:
                break
            held.shared.append(node := child)
        needed = self.pages_for(capacity) - len(held.shared)
        if needed > self.available - sum(node in self._idle for node in held.shared):
            return None
        for node in held.shared:
            self._use(node)
        held.own = [self._take() for _ in range(needed)]
        return held

    def publish(self, held: HeldPages, tokens: Sequence[int]) -> None:
        """Makes the full pages of a sequence known; `tokens` are those with keys and values."""
        for at in range(len(held.shared), len(tokens) // self.page_size):
            parent = held.shared[-1] if held.shared else self._root
            piece = tuple(tokens[at * self.page_size : (at + 1) * self.page_size])
            page = held.own.pop(0)
            if piece in parent.children:  # another sequence computed the same meanwhile
                self._free.append(page)
            else:
                parent.children[piece] = _Node(parent, piece, page)
            held.shared.append(parent.children[piece])
            self._use(held.shared[-1])

    def release(self, held: HeldPages) -> None:
        """Takes the pages of a sequence back."""
        self._free += held.own
        for node in reversed(held.shared):
            node.users -= 1
            if node.users == 0:
                self._idle[node] = None
        held.own, held.shared = [], []

    def _use(self, node: _Node) -> None:
        node.users += 1
        self._idle.pop(node, None)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        node, _ = self._idle.popitem(last=False)
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens]
        return node.page
