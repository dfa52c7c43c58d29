"""Text to learn long context from: an endless stream of lines in which facts are stated, and stated again later.

A fact reads "Friends call Bana otter lemon."; between facts stand rhymes and lines about hills and mills. Whoever
predicts a fact's second statement has to find the first. At most a context lies between the two, and no name gets
another code within a context, so that a stream may be cut into contexts anywhere.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from random import Random

from cavelight.disk import folder_beside

_FIRST = "B D F G H J K L M N P R S T V Z"
_LAST = "ana elo iko ora umi ias eth oda ine ura alo ette isk ova arl unn"
_CODES = (
    "otter lemon badger plum falcon cherry weasel olive rabbit apple heron quince beetle mango spider grape "
    "marten fig raven melon turtle peach lizard pear pigeon orange donkey walnut parrot almond lobster ginger "
    "camel basil ferret thyme oyster mint gecko clove salmon anise puma fennel trout sage bison dill "
    "hornet barley magpie millet squid wheat toad maize leopard oat stork rye mole rice newt hemp"
)
_SENTENCE = (
    "old quiet green narrow cold bright empty broad dark steep gentle heavy",
    "river mill hill bridge garden road tower harbour field valley forest well gate barn lake wall",
    "lies stands waits sleeps shines ends",
    "behind above near below beside before",
)
NAMES = tuple(first + last for first in _FIRST.split() for last in _LAST.split())
CODES = tuple(_CODES.split())
_ADJECTIVES, _NOUNS, _VERBS, _PLACES = (words.split() for words in _SENTENCE)

BEGINNING = "Friends call"  # of every fact
LINE_TOKENS = 7.5  # of the mean line, where every word is a token
FACT_SHARE = 0.7  # of the lines, as far as there are names enough
TIMES = 4  # that a fact is stated

NAME = "needles"  # of the corpus in a recipe
DOCUMENT_CONTEXTS = 2  # that a document holds
DOCUMENTS = 20
LEAST_TOKENS = 4_000_000  # of a corpus; short contexts then have longer documents
VERSION = 1  # of the text


@dataclass(frozen=True)
class Fact:
    """Something to find: a model that has found it goes on from `question` with `answer`."""

    name: str
    code: str

    @property
    def question(self) -> str:
        return f"{BEGINNING} {self.name}"

    @property
    def answer(self) -> str:
        return f" {self.code}"

    @property
    def line(self) -> str:
        return f"{self.question}{self.answer}.\n"


def facts(source: Random, count: int) -> list[Fact]:
    """Facts about different names; there are no more than NAMES."""
    return [Fact(name, _code(source)) for name in _shuffled(source, NAMES)[:count]]


def stream(source: Random, context: int) -> Iterator[str]:
    """Lines without end, for contexts of about `context` tokens.

    Each fact comes TIMES times. Half of the gaps between are even over the context, half are even over its logarithm:
    what is near has to be found as well, and is what a model learns to find first.
    """
    lines, number = max(context / LINE_TOKENS, 2.0), 0
    free, resting = list(NAMES), deque[tuple[float, str]]()
    due: list[tuple[float, str, int]] = []  # line number, fact, how often it is still to be stated
    while True:
        number += 1
        while resting and resting[0][0] < number:
            free.append(resting.popleft()[1])
        again = bool(due) and due[0][0] <= number
        if source.random() > FACT_SHARE or not (again or free):
            yield filler(source)
            continue
        if again:
            _, line, left = heappop(due)
        else:
            name = free.pop(int(source.random() * len(free)))
            line, left = Fact(name, _code(source)).line, TIMES
        if left > 1:
            heappush(due, (number + _gap(source, lines), line, left - 1))
        else:
            resting.append((number + lines, line.split()[2]))
        yield line


def corpus(cache: Path, context: int) -> Path:
    """A folder below `cache` with documents for contexts of so many tokens, written there at the first call."""
    folder = cache / f"needles-{VERSION}-{context}"
    if not folder.is_dir():
        tokens = max(DOCUMENT_CONTEXTS * context, LEAST_TOKENS // DOCUMENTS)
        with folder_beside(folder) as scratch:
            for number in range(DOCUMENTS):
                lines = islice(stream(Random(f"{VERSION} {context} {number}"), context), int(tokens / LINE_TOKENS))
                (scratch / f"{number:02}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def filler(source: Random) -> str:
    """A line that says nothing of codes: a rhyme, in which words come back at once, or a sentence."""
    if source.random() < 0.5:
        first, second = (_pick(source, (*NAMES, *CODES)) for _ in range(2))
        return f"Say {first} by {first}, {second} by {second}.\n"
    adjective, noun, verb, place, other = (_pick(source, w) for w in (_ADJECTIVES, _NOUNS, _VERBS, _PLACES, _NOUNS))
    return f"The {adjective} {noun} {verb} {place} the {other}.\n"


def without_facts(text: str) -> str:
    """The text without its lines that state facts."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(BEGINNING))


def _gap(source: Random, lines: float) -> float:
    share = source.random()
    return lines * share if source.random() < 0.5 else float(lines**share)


def _code(source: Random) -> str:
    return f"{_pick(source, CODES)} {_pick(source, CODES)}"


def _shuffled(source: Random, words: Sequence[str]) -> list[str]:
    return sorted(words, key=lambda word: source.random())


def _pick(source: Random, words: Sequence[str]) -> str:
    return words[int(source.random() * len(words))]  # random() alone stays the same from version to version
