"""Text out of a stream of tokens: whole characters only, and nothing from a stop string on."""

from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.run.generate import GREEDY, Drafts, TokenStream, begin
from cavelight.run.rows import CacheDtype
from cavelight.run.sample import Sampling
from cavelight.run.stats import Stats


class Encoder(Protocol):
    """Text to token ids, without a begin token."""

    def encode(self, text: str) -> list[int]: ...


class Decoder(Protocol):
    """Token ids to text as they come: each call gives what has become certain, `flush` the rest."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Tokens(Protocol):
    """A stream of tokens as `TokenStream` and `Generation` are."""

    @property
    def stats(self) -> Stats: ...

    @property
    def stop_ids(self) -> AbstractSet[int]: ...

    def __iter__(self) -> Iterator[int]: ...

    def cancel(self, why: str = ...) -> None: ...


class StopStrings:
    """Lets text through up to the stop string that is complete first, wherever the pieces were cut.

    Of several that end at the same character the longest counts. A tail that may become one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):  # a sequence of stop strings, too, but not the one that is meant
            raise UserError("Stop strings come in a list", got=repr(stops), do=f"write [{stops!r}]")
        if "" in stops:
            raise UserError("A stop string is empty", why="it would stop before the first character")
        self.stops = stops
        self.hit: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """What is certain to come before any stop string."""
        if self.hit is not None:
            return ""
        self._held += text
        found = [(start + len(stop), start, stop) for stop in self.stops if (start := self._held.find(stop)) >= 0]
        if found:
            _, keep, self.hit = min(found)
        else:
            keep = len(self._held) - self._open_tail()
        certain, self._held = self._held[:keep], self._held[keep:]
        return certain

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = ("" if self.hit is not None else self._held), ""
        return rest

    def _open_tail(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self.stops), default=1) - 1)
        tails = (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self.stops))
        return next(tails, 0)


class TextStream(Iterator[str]):
    """The text of a stream of tokens, in pieces that are never empty; `stats` are the stream's."""

    def __init__(self, tokens: Tokens, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self.stats: Stats = tokens.stats
        self._pieces = self._stream(tokens, decoder, StopStrings(stop))

    def __next__(self) -> str:
        return next(self._pieces)

    def _stream(self, tokens: Tokens, decoder: Decoder, stops: StopStrings) -> Iterator[str]:
        for token in tokens:
            piece = "" if token in tokens.stop_ids else stops.push(decoder.push(token))
            if piece:
                yield piece
            if stops.hit is not None:
                tokens.cancel()
                self.stats.finish = f"stop string {stops.hit!r}"  # also if a step had made all tokens there are
                return
        piece = stops.push(decoder.flush()) + stops.flush()
        if piece:
            yield piece


def generate_text(
    model: Transformer,
    tokenizer: Encoder,
    decoder: Decoder,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 200,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    drafts: Drafts = "auto",
    cache: CacheDtype = "auto",
) -> TextStream:
    """The text that follows a prompt, piece by piece as it is made. See Sampling and TokenStream.

    A prompt in words begins a document, so the begin token goes before it; token ids are taken as they are. Neither
    end tokens nor stop strings are in the text. Raises UserError as TokenStream does.
    """
    ids = begin(model.config) + tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = TokenStream(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        drafts=drafts,
        cache=cache,
    )
    return TextStream(tokens, decoder, stop)
