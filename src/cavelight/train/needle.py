"""Needles in a haystack: facts hidden at all depths of long text, and whether a model finds them.

Letters: T tokens, D hidden size.

A haystack goes through the model once and leaves its latent rows in the cache; each question then stands right behind
it, where the one before stood, since a cache row is addressed by its position. So many needles share one haystack.
That makes it harder for the model, not easier: each distracts from the others.
"""

import time
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from random import Random

import torch

from cavelight.data.needles import NAMES, Fact, facts, without_facts
from cavelight.data.tokenizer import Tokenizer
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.run.cache import LatentCache
from cavelight.run.generate import begin
from cavelight.run.rows import CacheDtype, cache_dtype
from cavelight.spec.events import Event, Phase
from cavelight.train.passage import hidden_of

NEEDLE_SHARE = 1 / 8  # of a haystack's tokens that needles take at most
MOST_TOGETHER = 10  # needles of one depth in one haystack
LEAST_BORDERS = 8  # of a haystack: places at which a needle may stand, and its text may end


@dataclass(frozen=True)
class Found:
    """Needles of one length: how many were found of how many asked for in each depth, from the beginning on.

    `seconds` is the time that all haystacks of this length took, `cache_bytes` what the latent cache of one holds.
    """

    length: int
    found: tuple[int, ...]
    asked: tuple[int, ...]
    haystacks: int
    seconds: float
    cache_bytes: int

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(found / asked for found, asked in zip(self.found, self.asked, strict=True))


def find_needles(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    lengths: Sequence[int],
    *,
    depths: int = 10,
    trials: int = 10,
    seed: int = 0,
    cache: CacheDtype = "auto",
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Found]:
    """Hide facts in `text` and ask for them: for each length in tokens, question and answer included, `trials` needles
    in each of `depths` equal parts of the haystack.

    The text is used as a ring, from a random place on. A needle stands at a random place of its part, where a line
    begins; it is found if the greedy continuation of its question is its answer. Raises UserError for a length that
    the model does not reach, or that cannot hold a needle in each depth.
    """
    _check_reach(model, max(lengths))
    hay = tokenizer.encode(without_facts(text))
    if not hay:
        raise UserError("There is no text to hide needles in", got="nothing but facts", do="name more text with --data")
    dtype, found = cache_dtype(model.config, model.lm_head.weight.dtype, cache), []
    for length in lengths:
        latents, source = LatentCache(model.config, length, dtype), Random(f"{seed} {length}")
        found.append(_find(model, tokenizer, hay, latents, length, depths, trials, source, on_event))
    return found


def plain_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of documents end to end, without control tokens; each document ends with a line's end."""
    control = set(tokenizer.control.values())
    runs = (tokenizer.decode(run) for is_control, run in groupby(tokens, control.__contains__) if not is_control)
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in runs)


def _find(
    model: Transformer,
    tokenizer: Tokenizer,
    hay: Sequence[int],
    cache: LatentCache,
    length: int,
    depths: int,
    trials: int,
    source: Random,
    on_event: Callable[[Event], None],
) -> Found:
    """All haystacks of one length."""
    together, began = _together(tokenizer, length, depths), time.monotonic()
    found, asked = [0] * depths, [0] * depths
    starts = range(0, trials, together)
    for number, done in enumerate(starts):
        on_event(Phase(f"haystacks of {length:,} tokens", number, len(starts), "haystacks"))
        each = min(together, trials - done)
        hidden = facts(source, each * depths)
        tokens = haystack(tokenizer, hay, hidden, depths, length, source, begin(model.config))
        deque(hidden_of(model, cache, tokens), maxlen=0)
        for place, fact in enumerate(hidden):
            found[place // each] += answers(model, tokenizer, cache, len(tokens), fact)
            asked[place // each] += 1
    on_event(Phase(f"haystacks of {length:,} tokens", len(starts), len(starts), "haystacks"))
    return Found(length, tuple(found), tuple(asked), len(starts), time.monotonic() - began, cache.bytes())


def haystack(
    tokenizer: Tokenizer,
    hay: Sequence[int],
    hidden: Sequence[Fact],
    depths: int,
    length: int,
    source: Random,
    start: Sequence[int] = (),
) -> list[int]:
    """Tokens of whole lines with the facts among them, the first ones in the first of `depths` parts and so on.

    Where a line is far longer than others, or the text has none, needles stand within it, on lines of their own.
    `start` comes first; behind, question and answer of any of the facts still fit into `length`.
    """
    needles = [tokenizer.encode(fact.line) for fact in hidden]
    room = length - len(start) - sum(map(len, needles)) - max(_room_to_answer(tokenizer, fact) for fact in hidden)
    offset = int(source.random() * len(hay))
    text = [hay[(offset + i) % len(hay)] for i in range(room)]
    longest, line_end = room // max(depths, LEAST_BORDERS), tokenizer.encode("\n")
    borders = line_borders = _line_borders(tokenizer, text)
    if _longest_gap(borders, room) > longest:
        text = text[: room - len(line_end) * (len(needles) + 1)]
        borders = _finer_borders(tokenizer, text, line_borders, longest)
    within = set(borders) - set(line_borders)
    per_depth = len(hidden) // depths
    wanted = [(number // per_depth + source.random()) / depths * borders[-1] for number in range(len(hidden))]
    places = [borders[bisect(borders, place) - 1] for place in wanted]
    tokens, done = list(start), 0
    for border, needle in sorted(zip(places, needles, strict=True)):
        tokens += [*text[done:border], *(line_end if border in within else ()), *needle]
        done = border
    return tokens + text[done : borders[-1]] + (line_end if borders[-1] in within else [])


@torch.inference_mode()
def answers(model: Transformer, tokenizer: Tokenizer, cache: LatentCache, start: int, fact: Fact) -> bool:
    """Whether the greedy continuation of the question, asked at position `start`, is the fact's answer."""
    tokens, new = tokenizer.encode(fact.question), list[int]()
    for _ in range(_answer_tokens(tokenizer, fact)):
        (piece,) = hidden_of(model, cache, tokens, start)
        start += len(tokens)
        tokens = [int(model.head(piece[1][-1:]).argmax())]
        new += tokens
        text = tokenizer.decode(new)
        if len(text) > len(fact.answer):
            return text.startswith(fact.answer) and not text[len(fact.answer)].isalnum()
        if not fact.answer.startswith(text.rstrip("\ufffd")):  # the beginning of a character may be there
            return False
    return True


def _check_reach(model: Transformer, length: int) -> None:
    reach = model.config.max_position_embeddings
    if length > reach:
        raise UserError(
            "The model does not reach so far",
            got=f"{length:,} tokens",
            why=f"its max_position_embeddings is {reach:,}",
            do=f"extend it first (cavelight extend), or ask for at most {reach}",
        )


def _together(tokenizer: Tokenizer, length: int, depths: int) -> int:
    """Needles of one depth in one haystack."""
    needle = max(len(tokenizer.encode(fact.line)) for fact in facts(Random(0), 32))
    together = min(int(length * NEEDLE_SHARE) // (needle * depths), len(NAMES) // depths, MOST_TOGETHER)
    if together < 1:
        raise UserError(
            "The haystack is too short for its needles",
            got=f"{length} tokens for {depths} needles of {needle}",
            do="ask for longer ones, or for fewer depths",
        )
    return together


def _answer_tokens(tokenizer: Tokenizer, fact: Fact) -> int:
    """New tokens after which an answer is surely told, and whether it ends there."""
    return len(tokenizer.encode(fact.answer)) + 1


def _room_to_answer(tokenizer: Tokenizer, fact: Fact) -> int:
    return len(tokenizer.encode(fact.question)) + _answer_tokens(tokenizer, fact)


def _line_borders(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Places between whole lines: the beginning, and after each line's end."""
    ends = {token for token in set(tokens) if tokenizer.decode([token]).endswith("\n")}
    return [0, *(place + 1 for place, token in enumerate(tokens) if token in ends)]


def _finer_borders(tokenizer: Tokenizer, tokens: Sequence[int], lines: Sequence[int], longest: int) -> list[int]:
    """`lines`, and more places wherever `longest` tokens follow without one.

    These are, in so far as they are needed: after a line's end and the next line's indentation, which may be one
    token; between words; between characters; any.
    """
    bytes_of = tokenizer.bytes_of if tokenizer.is_byte_level else lambda token: tokenizer.decode([token]).encode()
    texts = {token: bytes_of(token) for token in set(tokens)}
    kinds: list[Callable[[bytes, bytes], bool]] = [
        lambda before, after: b"\n" in before and before[-1:].isspace(),
        lambda before, after: before[-1:].isspace() or after[:1].isspace(),
        lambda before, after: not b"\x80" <= after[:1] < b"\xc0",  # in UTF-8 these go on with a character
        lambda before, after: True,
    ]
    borders = [place for place in lines if place <= len(tokens)]
    for is_border in kinds:
        ends = [*borders, len(tokens)]
        borders = [
            place
            for start, end in pairwise(ends)
            for place in range(start, max(end, start + 1))
            if place == start or (end - start > longest and is_border(texts[tokens[place - 1]], texts[tokens[place]]))
        ]
    return borders


def _longest_gap(borders: Sequence[int], end: int) -> int:
    return max(after - before for before, after in pairwise([*borders, end]))
