"""What is asked of an engine, and what it gives back piece by piece.

Letters: T positions that a step decided, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from threading import Lock

from torch import Tensor

from cavelight.errors import UserError, check_options
from cavelight.run.choose import Allowed, Chooser
from cavelight.run.generate import GREEDY, Drafts, cut, limit_rule
from cavelight.run.pace import Chances
from cavelight.run.sample import Sampling
from cavelight.run.scheduler import Job
from cavelight.run.speculate import Chain
from cavelight.run.stats import CANCELLED, Stats


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

    def __post_init__(self) -> None:
        stop_ids = () if self.stop_ids is None else self.stop_ids
        likeliest = 0 if self.likeliest is None else self.likeliest
        rules = (
            limit_rule(self.max_new_tokens),
            ("stop_ids", isinstance(stop_ids, Collection) and all(isinstance(id, int) for id in stop_ids), "token ids"),
            ("samples", isinstance(self.samples, int) and self.samples > 0, "1 or more"),
            ("drafts", self.drafts == "auto" or isinstance(self.drafts, int), "auto or a number"),
            ("priority", isinstance(self.priority, int), "a whole number"),
            ("client", isinstance(self.client, str), "a name"),
            ("likeliest", isinstance(likeliest, int) and likeliest >= 0, "0 or more, or None"),
            ("allowed", self.allowed is None or callable(self.allowed), "a function"),
        )
        check_options("The request cannot be used", self, rules)


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
        self.chooser = Chooser(sampling, request.allowed, stop_ids)
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.stats = Stats(prompt_tokens=len(prompt), drafts=drafts)
        self.error: Exception | None = None
        self.asked, self.began, self.last = now, 0.0, now
        # The engine's own notes.
        self.failed: Exception | None = None  # by which it will end
        self.job: Job | None = None
        self.siblings: list[Generation] = []  # that begin where the prompt ends
        self.chain = Chain()
        self.chances = Chances(drafts)
        self.guesses: list[int] = []  # those that the next step verifies
        self._work, self._cancel, self._given, self._guard = work, cancel, 0, Lock()

    def __next__(self) -> int:
        while self._given == len(self.tokens):
            if self.error is not None:
                raise self.error
            if self.stats.finish:
                raise StopIteration
            if not self._work() and self._given == len(self.tokens) and not self.stats.finish:
                raise RuntimeError("the engine has nothing to do, yet this generation has not ended")
        self._given += 1
        return self.tokens[self._given - 1]

    def cancel(self, why: str = CANCELLED) -> None:
        """End it, whatever it is at; its pages are free at the engine's next step."""
        self._cancel(self, why)

    def end(self, why: str, error: Exception | None = None) -> bool:
        """Note that it has ended; False if it had already. From any thread."""
        with self._guard:
            if self.stats.finish:
                return False
            self.error, self.stats.finish = error, why
            return True

    @property
    def room(self) -> int:
        """Tokens that are still wanted."""
        return self.request.max_new_tokens - len(self.tokens)

    def begin(self, job: Job, now: float) -> None:
        """It has pages now, those up to `job.done` filled by others."""
        if not self.began:
            self.began, self.stats.queue_seconds = now, now - self.asked
        self.chain = Chain(home=job.table, base=job.done, seen=job.done)

    def lose(self) -> None:
        """Its place was taken; it will begin again, or has ended."""
        self.chain, self.guesses = Chain(), []

    def guess(self, logits_V: Tensor, tokens: Sequence[int]) -> int | None:
        """As its chooser does; the modules' NaN ends this generation and no other."""
        try:
            return self.chooser.guess(logits_V, tokens)
        except UserError as error:
            self.failed = error
            return None

    def note(self, drafts: Sequence[int], new: Sequence[int], now: float, alone: bool) -> None:
        """A step that verified `drafts` and made `new` tokens; what it took says something if it was alone."""
        seconds = now - self.last if alone else None
        if not self.tokens:
            self.stats.prefill_seconds = now - self.began
        elif drafts:
            self.chances.note(len(drafts), self.stats.add_round(drafts, new, seconds))
        elif seconds is not None:
            self.stats.plain_seconds.append(seconds)
        self.stats.decode_seconds = now - self.began - self.stats.prefill_seconds
        self.last = now

    def take(self, new: Sequence[int], logits_TV: Tensor, limit: int) -> None:
        """Tokens that a step decided, with the logits that each follows from; `limit`: the context's."""
        with self._guard:
            if self.stats.finish:  # cancelled meanwhile
                return
            kept, finish = cut(new, self.stop_ids, self.room)
            length = len(self.prompt) + len(self.tokens) + len(new)
            if finish is None and length > limit:
                finish = f"context's limit of {limit} tokens"
            if self.request.likeliest is not None:
                rows = zip(kept, logits_TV, strict=False)
                self.logprobs += [logprob(token, logits_V, self.request.likeliest) for token, logits_V in rows]
            self.stats.new_tokens += len(kept)
            self.tokens += kept
            self.stats.finish = finish


def logprob(token: int, logits_V: Tensor, likeliest: int) -> Logprob:
    """Its report."""
    log_p_V = logits_V.double().log_softmax(dim=0)
    top = log_p_V.topk(min(likeliest, len(log_p_V)))
    return Logprob(token, float(log_p_V[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
