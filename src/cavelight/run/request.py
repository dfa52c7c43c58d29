"""What is asked of an engine, and what it gives back piece by piece.

Letters: T positions that a step decided, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import Tensor

from cavelight.run.choose import Allowed, Chooser
from cavelight.run.generate import GREEDY, Drafts, cut
from cavelight.run.pace import Chances
from cavelight.run.sample import Sampling
from cavelight.run.scheduler import Job
from cavelight.run.speculate import Chain, Draft
from cavelight.run.stats import Stats


@dataclass(frozen=True)
class Request:
    """A prompt and what is to be made of it.

    samples: so many outputs of the prompt, which is computed once; each has a seed of its own, the next one.
    drafts: 0 for none, a number for so many at every step, "auto" for as many as pay. priority: higher ones go first.
    client: among equals, whoever was served least goes first. likeliest: with each token, report its log probability
    and those of so many likeliest ones; None for no report. allowed: which tokens may follow; see `choose.Allowed`.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 100
    sampling: Sampling = GREEDY
    stop_ids: AbstractSet[int] | None = None
    samples: int = 1
    drafts: Drafts = "auto"
    priority: int = 0
    client: str = ""
    likeliest: int | None = None
    allowed: Allowed | None = None


@dataclass(frozen=True)
class Logprob:
    """Of the model's own distribution, before any filter: the token's log p, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    likeliest: Sequence[tuple[int, float]]


class Generation(Iterator[int]):
    """One output of a request. Iterating gives its tokens as they come, and lets the engine work until there is one.

    `stats.finish` says why it ended, None while it goes on. Raises the error that ended it, if one did.
    """

    def __init__(
        self,
        request: Request,
        prompt: Sequence[int],
        stop_ids: AbstractSet[int],
        number: int,
        drafts: int,
        work: Callable[[], bool],
        cancel: Callable[["Generation", str], None],
        now: float,
    ) -> None:
        sampling = request.sampling
        if number and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + number)
        self.request, self.prompt, self.stop_ids = request, prompt, stop_ids
        self.chooser = Chooser(sampling, request.allowed)
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.stats = Stats(prompt_tokens=len(prompt), drafts=drafts)
        self.error: Exception | None = None
        self.asked = self.last = now
        # The engine's own notes.
        self.job: Job | None = None
        self.siblings: list[Generation] = []  # that begin where the prompt ends
        self.chain = Chain()
        self.chances = Chances(drafts)
        self.guesses: list[Draft] = []  # those that the next step verifies
        self._work, self._cancel, self._given = work, cancel, 0

    def __next__(self) -> int:
        while self._given == len(self.tokens):
            if self.error is not None:
                raise self.error
            if self.stats.finish:
                raise StopIteration
            self._work()
        self._given += 1
        return self.tokens[self._given - 1]

    def cancel(self, why: str = "cancelled") -> None:
        """End it, whatever it is at; its pages are free at the engine's next step."""
        self._cancel(self, why)

    @property
    def room(self) -> int:
        """Tokens that are still wanted."""
        return self.request.max_new_tokens - len(self.tokens)

    def begin(self, job: Job) -> None:
        """It has pages now, those up to `job.done` filled by others."""
        self.chain = Chain(home=job.table, base=job.done, seen=job.done)

    def lose(self) -> None:
        """Its pages were taken; it will begin again."""
        self.chain, self.guesses = Chain(), []

    def guess(self, logits_V: Tensor, tokens: Sequence[int]) -> Draft:
        """As its chooser does; an error ends this generation and no other."""
        try:
            return self.chooser.guess(logits_V, tokens)
        except Exception as error:
            self.error = error
            return Draft(0)

    def note(self, drafts: int, made: int, now: float) -> None:
        """A step that verified so many drafts and made so many tokens."""
        if not self.tokens:
            self.stats.prefill_seconds = now - self.asked
        self.stats.decode_seconds = now - self.asked - self.stats.prefill_seconds
        if drafts:
            self.stats.add_round(drafts, made, now - self.last)
            self.chances.note(drafts, made - 1)
        else:
            self.stats.plain_seconds.append(now - self.last)
        self.last = now

    def take(self, new: Sequence[int], logits_TV: Tensor, limit: int) -> None:
        """Tokens that a step decided, with the logits that each follows from; `limit`: the context's."""
        if self.stats.finish:  # cancelled meanwhile
            return
        kept, self.stats.finish = cut(new, self.stop_ids, self.room)
        length = len(self.prompt) + len(self.tokens) + len(new)
        if self.stats.finish is None and length > limit:
            self.stats.finish = f"context's limit of {limit} tokens"
        if self.request.likeliest is not None:
            rows = zip(kept, logits_TV, strict=False)
            self.logprobs += [logprob(token, logits_V, self.request.likeliest) for token, logits_V in rows]
        self.stats.new_tokens += len(kept)
        self.tokens += kept


def logprob(token: int, logits_V: Tensor, likeliest: int) -> Logprob:
    """Its report."""
    log_p_V = logits_V.double().log_softmax(dim=0)
    top = log_p_V.topk(min(likeliest, len(log_p_V)))
    return Logprob(token, float(log_p_V[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
