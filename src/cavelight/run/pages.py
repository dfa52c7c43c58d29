"""Pages of the latent cache: who holds them, what they hold, and which is given away first. Knows no tensors.

A page has room for `size` positions in all layers. A full page is known by the tokens that made it, all from position
0 on, so that a prompt which begins like an earlier one finds its pages again, also those that nobody holds any more:
such pages are given away last, the one that was used longest ago before the others. Several sequences may hold a page
that will not be written to again; who would write to it gets a copy when the sequences part (`Table.fork`).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Copy = tuple[int, int]  # from page, to page
_Key = tuple[int, tuple[int, ...]]  # the page before (of the first one -1 - kind), the tokens that this one adds


class OutOfPages(Exception):
    """No page is left to give; nothing was changed."""


class Pages:
    """`count` pages of `size` positions.

    Pages are of a kind; only those of one kind are ever the same. lookahead: of each kind, how many tokens after its
    last position a page depends on. An MTP module k deep makes the row at position i of the tokens up to i + k, so
    pages with such rows are known by that many tokens more.
    """

    def __init__(self, count: int, size: int, lookahead: Sequence[int] = (0,)) -> None:
        assert count > 0 and size > 0 and min(lookahead) >= 0
        self.count, self.size, self.lookahead = count, size, lookahead
        self.holders = [0] * count
        self._blank = list(range(count - 1, -1, -1))  # neither held nor known; the last is given first
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, but held by nobody; the first is given first
        self._known: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}  # of every known page

    @property
    def free(self) -> int:
        """Pages that can be given away."""
        return len(self._blank) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - self.free

    @property
    def idle(self) -> int:
        """Of the free pages, those that are known: found again if a prompt begins alike."""
        return len(self._idle)

    def is_known(self, page: int) -> bool:
        return page in self._keys

    def take(self, number: int) -> list[int]:
        """So many pages for one holder. Raises OutOfPages."""
        if number > self.free:
            raise OutOfPages
        return [self._give() for _ in range(number)]

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of pages that are held or known."""
        for page in pages:
            self._idle.pop(page, None)
            self.holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer. `pages` in the order of positions: what follows a page is given away before it."""
        for page in reversed(pages):
            self.holders[page] -= 1
            assert self.holders[page] >= 0, f"page {page} was not held"
            if self.holders[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def find(self, tokens: Sequence[int], kind: int = 0) -> list[int]:
        """The known pages that `tokens` begins with, in order; not held by this."""
        found: list[int] = []
        while key := self._key(tokens, found, len(found), kind):
            page = self._known.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def know(self, pages: list[int], first: int, tokens: Sequence[int], kind: int = 0) -> int:
        """Make those of `pages` known, from number `first` on, that `tokens` fill; how many are known then.

        Pages before `first` are known already. Where another page holds the same, that one takes this one's place in
        `pages`, and this one is given back.
        """
        number = first
        while number < len(pages) and (key := self._key(tokens, pages, number, kind)):
            page = pages[number]
            assert self._keys.get(page, key) == key, f"page {page} is known by other tokens"
            twin = self._known.setdefault(key, page)
            if twin == page:
                self._keys[page] = key
            else:
                self.hold([twin])
                self.release([page])
                pages[number] = twin
            number += 1
        return number

    def _key(self, tokens: Sequence[int], pages: Sequence[int], number: int, kind: int) -> _Key | None:
        """Of page `number`, which follows those before it in `pages`, if `tokens` reach far enough to tell."""
        ahead = self.lookahead[kind]
        end = (number + 1) * self.size + ahead
        start = number * self.size + ahead if number else 0
        before = pages[number - 1] if number else -1 - kind
        return (before, tuple(tokens[start:end])) if len(tokens) >= end else None

    def _give(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            # What follows it went before: whoever held that held this too, and released it later.
            page, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(page)]
        self.holders[page] = 1
        return page


@dataclass
class Table:
    """One sequence's pages, in the order of positions."""

    pool: Pages
    kind: int = 0
    pages: list[int] = field(default_factory=list)
    known: int = 0  # of its pages, from the first on

    def open(self, tokens: Sequence[int]) -> int:
        """Hold the known pages that `tokens` begins with; how many positions they cover, never all of `tokens`."""
        assert not self.pages
        found = self.pool.find(tokens[:-1], self.kind)
        self.pool.hold(found)
        self.pages, self.known = found, len(found)
        return len(found) * self.pool.size

    def lacks(self, end: int) -> int:
        """Pages that `reserve(end)` would take."""
        return max(0, -(-end // self.pool.size) - len(self.pages))

    def reserve(self, end: int) -> None:
        """Make room for positions before `end`. Raises OutOfPages, and has changed nothing then."""
        self.pages += self.pool.take(self.lacks(end))

    def fill(self, tokens: Sequence[int]) -> None:
        """Rows stand for all of `tokens` (less the lookahead): full pages become known to others."""
        self.known = self.pool.know(self.pages, self.known, tokens, self.kind)

    def fork(self, start: int) -> "tuple[Table, list[Copy]]":
        """A sequence with the same rows that will write from `start` on, and which pages to copy for it.

        This one, too, must not write before `start` any more. Raises OutOfPages, and has changed nothing then.
        """
        whole = start // self.pool.size
        own = self.pool.take(len(self.pages) - whole)
        self.pool.hold(self.pages[:whole])
        copies = list(zip(self.pages[whole:], own, strict=True))
        return Table(self.pool, self.kind, self.pages[:whole] + own, min(self.known, whole)), copies

    def close(self) -> None:
        """Give all pages back."""
        self.pool.release(self.pages)
        self.pages, self.known = [], 0
