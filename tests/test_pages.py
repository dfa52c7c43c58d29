"""Pages: under any workload a sequence reads what it, or one that began alike, has written, and none is lost."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cavelight.run.pages import Copy, OutOfPages, Pages, Table


class Memory:
    """What pages hold: of each place the tokens that its row was made of."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.rows: dict[tuple[int, int], tuple[int, ...]] = {}

    def copy(self, copies: list[Copy]) -> None:
        for source, target in copies:
            for offset in range(self.pages.size):
                self.rows[target, offset] = self.rows.get((source, offset), ())

    def write(self, table: Table, tokens: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            page, offset = table.pages[position // self.pages.size], position % self.pages.size
            assert self.pages.holders[page] == 1, "written to by two"
            self.rows[page, offset] = tuple(tokens[: position + 1 + self.pages.lookahead[table.kind]])

    def read(self, table: Table, end: int) -> list[tuple[int, ...]]:
        size = self.pages.size
        return [self.rows[table.pages[position // size], position % size] for position in range(end)]


class Sequence:
    def __init__(self, table: Table, tokens: list[int], done: int) -> None:
        self.table, self.tokens, self.done = table, tokens, done

    def fork(self, token: int, memory: Memory) -> "Sequence | None":
        start = max(0, self.done - memory.pages.lookahead[self.table.kind])
        try:
            table, copies = self.table.fork(start)
        except OutOfPages:
            return None
        memory.copy(copies)
        return Sequence(table, [*self.tokens[: self.done], token], start)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 4), count=st.integers(1, 14), lookahead=st.integers(0, 3))
def test_any_workload(seed: int, size: int, count: int, lookahead: int) -> None:
    source = random.Random(seed)
    pages = Pages(count, size, (lookahead, 0))  # as with MTP modules and without
    memory, live, found = Memory(pages), list[Sequence](), 0
    for _ in range(60):
        act = source.random()
        if act < 0.3 or not live:
            tokens = [source.randrange(2) for _ in range(source.randrange(1, 4 * size + lookahead + 2))]
            table = Table(pages, kind=source.randrange(2))
            sequence = Sequence(table, tokens, table.open(tokens))
            found += sequence.done
            live.append(sequence)
        elif act < 0.75:
            grow(source.choice(live), source, memory)
        elif act < 0.85:
            parent = source.choice(live)
            if parent.done and (twin := parent.fork(source.randrange(2), memory)):
                live.append(twin)
        else:
            sequence = live.pop(source.randrange(len(live)))
            sequence.table.close()
        for sequence in live:
            ahead = pages.lookahead[sequence.table.kind]
            expected = [tuple(sequence.tokens[: position + 1 + ahead]) for position in range(sequence.done)]
            for row, want in zip(memory.read(sequence.table, sequence.done), expected, strict=True):
                assert row[: len(want)] == want[: len(row)]  # the last rows may not have seen all that they look ahead
        check(pages, live)
    for sequence in live:
        sequence.table.close()
    assert pages.free == count and pages.held == 0


def grow(sequence: Sequence, source: random.Random, memory: Memory) -> None:
    """Compute some more positions, those that looked ahead too far once more; then a token follows."""
    pages, table = memory.pages, sequence.table
    ahead = pages.lookahead[table.kind]
    end = min(sequence.done + source.randrange(1, 6), len(sequence.tokens))
    behind = max(0, sequence.done - ahead)
    first = max(behind, table.known * pages.size)
    try:
        table.reserve(end)
    except OutOfPages:
        return
    memory.write(table, sequence.tokens, first, end)
    sequence.done = end
    table.fill(sequence.tokens[: end + ahead])
    if end == len(sequence.tokens):
        sequence.tokens.append(source.randrange(2))


def check(pages: Pages, live: list[Sequence]) -> None:
    assert {page: key for key, page in pages._known.items()} == pages._keys and len(pages._known) == len(pages._keys)
    assert all(before < 0 or before in pages._keys for before, _ in pages._known), "what a page follows went before it"
    holders = Counter(page for sequence in live for page in sequence.table.pages)
    assert pages.holders == [holders[page] for page in range(pages.count)]
    assert pages.held == len(holders)
    assert pages.idle <= pages.free


def test_a_prompt_finds_what_an_earlier_one_left() -> None:
    pages = Pages(8, 4)
    first = Table(pages)
    assert first.open(list(range(10))) == 0
    first.reserve(10)
    first.fill(list(range(10)))
    first.close()
    assert (pages.free, pages.idle) == (8, 2)
    second = Table(pages)
    assert second.open([*range(8), 99]) == 8
    assert pages.held == 2


def test_what_follows_a_page_is_given_away_before_it() -> None:
    """Or it would be found behind whatever that page holds next."""
    pages = Pages(2, 2)

    def leave(tokens: list[int]) -> None:
        table = Table(pages)
        table.open(tokens)
        table.reserve(len(tokens) // 2 * 2)
        table.fill(tokens)
        table.close()

    leave([1, 2, 3, 4, 5])
    leave([9, 9, 7])
    assert Table(pages).open([9, 9, 3, 4, 5]) == 2


def test_all_of_a_prompt_is_never_found() -> None:
    pages = Pages(4, 2)
    first = Table(pages)
    first.open([1, 2, 3, 4])
    first.reserve(4)
    first.fill([1, 2, 3, 4])
    assert Table(pages).open([1, 2, 3, 4]) == 2  # its last token has to be computed: something follows from it


def test_a_page_that_looks_ahead_is_known_by_what_follows() -> None:
    pages = Pages(4, 2, lookahead=(1,))
    first = Table(pages)
    first.open([1, 2, 3, 4])
    first.reserve(4)
    first.fill([1, 2, 3, 4])
    assert pages.find([1, 2, 9, 9]) == []
    assert pages.find([1, 2, 3, 9]) == first.pages[:1]


def test_pages_of_another_kind_are_not_found() -> None:
    pages = Pages(4, 2, (0, 0))
    first = Table(pages, kind=0)
    first.open([1, 2, 3])
    first.reserve(3)
    first.fill([1, 2, 3])
    assert Table(pages, kind=1).open([1, 2, 3]) == 0
    assert Table(pages, kind=0).open([1, 2, 3]) == 2


def test_siblings_that_part_know_a_page_by_the_same_tokens() -> None:
    """What follows a page tells nothing of its rows where no module looks ahead: a key too many would outlive it."""
    pages = Pages(6, 4, (2, 0))
    first = Table(pages, kind=1)
    first.open(list(range(5)))
    first.reserve(5)
    second, _ = first.fork(5)
    for table, tokens in ((first, [0, 1, 2, 3, 4, 5]), (second, [0, 1, 2, 3, 4, 6])):
        table.reserve(6)
        table.fill(tokens)
    assert pages.find([0, 1, 2, 3, 4, 5], kind=1) == pages.find([0, 1, 2, 3, 4, 6], kind=1) == first.pages[:1]
    assert len(pages._known) == len(pages._keys) == 1


def test_the_page_used_longest_ago_is_given_away_first() -> None:
    pages = Pages(3, 1)
    for token in (1, 2, 3):
        table = Table(pages)
        table.open([token, 0])
        table.reserve(1)
        table.fill([token])
        table.close()
    again = Table(pages)
    assert again.open([1, 0]) == 1
    again.close()
    pages.take(1)
    assert [bool(pages.find([token, 0])) for token in (1, 2, 3)] == [True, False, True]


def test_out_of_pages_changes_nothing() -> None:
    pages = Pages(2, 2)
    table, other = Table(pages), Table(pages)
    table.reserve(2)
    other.reserve(1)
    before = (list(pages.holders), list(table.pages))
    with pytest.raises(OutOfPages):
        table.reserve(3)
    with pytest.raises(OutOfPages):
        table.fork(1)
    assert (list(pages.holders), list(table.pages)) == before
