"""Who computes what in the next step: many sequences, a budget of tokens a step, a fixed number of pages.

Knows no tensors. A job is one sequence that grows, its tokens the prompt and what was made of it. In a step every job
that has only its last token to compute gets that one. What is left of the budget goes to prompts, in chunks and by
priority, those under way before waiting ones; and what is left then goes to drafts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from cavelight.run.pages import Copy, OutOfPages, Pages, Table


@dataclass(eq=False)
class Job:
    """One sequence. `done` positions have their rows in the cache; tokens from there on are to be computed.

    limit: the most positions that it may compute. priority: higher ones go first. client: whose it is; of equal
    priority, whoever was served least goes first. samples: as how many jobs it goes on after its prompt. ahead: so
    many positions after those of a step are written too, by who drafts.
    """

    tokens: list[int]
    limit: int
    table: Table
    priority: int = 0
    client: str = ""
    samples: int = 1
    ahead: int = 0
    drafts: int = 0  # how many guesses of what follows `tokens` there are
    done: int = 0
    shared: int = 0  # positions that it found in the cache when it began
    preempted: int = 0  # how often it had to give its pages back
    number: int = -1  # in the order of arrival

    @property
    def left(self) -> int:
        """Known tokens that are not computed; one in a job that decodes."""
        return len(self.tokens) - self.done


@dataclass(frozen=True)
class Part:
    """What a step computes of one job: `known` tokens from position `start` on, then `drafts` guesses."""

    job: Job
    start: int
    known: int
    drafts: int

    @property
    def count(self) -> int:
        return self.known + self.drafts

    @property
    def decides(self) -> bool:
        """Whether the step reaches the job's end, so that a token follows from it."""
        return self.start + self.known == len(self.job.tokens)


@dataclass
class Totals:
    """What was decided so far."""

    steps: int = 0
    tokens: int = 0
    begun: int = 0
    preempted: int = 0
    shared: int = 0  # positions that were found in the cache instead of computed
    together: int = 0  # the most jobs in a step


@dataclass
class Step:
    parts: list[Part] = field(default_factory=list)
    begun: list[Job] = field(default_factory=list)  # that have pages since this step
    preempted: list[Job] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)


class Scheduler:
    """Jobs that wait, jobs that run, and the pages between them.

    budget: tokens of a step, drafts included. most: jobs that may run at once. A job that could never have the pages
    it may need is refused when it comes, so that the first in rank can always be finished: all others give way to it.
    """

    def __init__(self, pages: Pages, budget: int, most: int) -> None:
        assert budget >= most > 0
        self.pages, self.budget, self.most = pages, budget, most
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.served: dict[str, int] = {}  # tokens computed for each client that has jobs here
        self.totals = Totals()
        self._numbers = count()

    def fits(self, limit: int) -> bool:
        """Whether a job of so many tokens could run if it were alone."""
        return -(-limit // self.pages.size) <= self.pages.count

    def add(self, job: Job) -> None:
        """Let a job wait. Who comes anew has been served as much as the least served client that is here."""
        assert self.fits(job.limit) and job.samples <= self.most and 0 < len(job.tokens) <= job.limit
        job.number = next(self._numbers)
        if job.client not in self.served:
            self.served[job.client] = min(self.served.values(), default=0)
        self.waiting.append(job)

    def fork(self, job: Job, tokens: list[int], start: int) -> tuple[Job, list[Copy]]:
        """One of a job's samples as a job of its own, with tokens that go on in its own way; which pages to copy now.

        Neither will write to positions before `start` any more. Where no pages are left the new one waits.
        """
        assert job.samples > 1
        job.samples -= 1
        table = Table(job.table.pool, job.table.kind)
        twin = replace(job, tokens=tokens, samples=1, drafts=0, done=0, shared=0, preempted=0, table=table)
        twin.number = next(self._numbers)
        try:
            twin.table, copies = job.table.fork(start)
        except OutOfPages:
            self.waiting.append(twin)
            return twin, []
        twin.done = twin.shared = job.done
        self.running.append(twin)
        return twin, copies

    def remove(self, job: Job) -> None:
        """End a job, wherever it is; its pages are free, what is known of them stays known."""
        (self.running if job in self.running else self.waiting).remove(job)
        job.table.close()
        if all(other.client != job.client for other in self._all()):
            del self.served[job.client]

    def plan(self) -> Step:
        """The next step. Its positions have pages; nothing but `advance` has to follow for each of its parts."""
        step = Step()
        for job in sorted(self.running, key=_rank):
            if job.left == 1 and job in self.running:  # else it gave way to one before it
                self._place(job, 1, step)
        self._place_prompts(step)
        self._place_drafts(step)
        self._count(step)
        return step

    def advance(self, part: Part, new: list[int]) -> None:
        """Account for a computed part; `new` tokens were decided by it, of which all but the last were drafts."""
        job = part.job
        self.served[job.client] += part.count
        job.done = part.start + part.known + max(0, len(new) - 1)
        job.tokens.extend(new)
        job.drafts = 0

    def _place_prompts(self, step: Step) -> None:
        """Those under way and waiting ones by priority. Where the first that waits cannot begin, all others wait."""
        while (left := self.budget - step.tokens) > 0:
            placed = {part.job for part in step.parts}
            under_way = min((job for job in self.running if job not in placed), key=_rank, default=None)
            waiting = min(self.waiting, key=self._turn, default=None)
            job = _first(under_way, waiting)
            if job is None:
                return
            # One that finds no pages, or gave way itself, comes after all that run: nobody is left to be placed.
            if (job is waiting and not self._begin(job, step)) or not self._place(job, min(job.left, left), step):
                return

    def _place_drafts(self, step: Step) -> None:
        """As many as fit into budget and pages: they are a wish, not a need.

        A part that ends before its job does has used the budget up, so that none are left for it.
        """
        left = self.budget - step.tokens
        for number, part in enumerate(step.parts):
            job, drafts = part.job, min(part.job.drafts, left)
            try:
                job.table.reserve(min(part.start + part.known + drafts + job.ahead, job.limit))
            except OutOfPages:
                continue
            step.parts[number] = replace(part, drafts=drafts)
            left -= drafts

    def _place(self, job: Job, known: int, step: Step) -> bool:
        """Put so many of the job's tokens into the step; False if it had to give way itself."""
        while job.table.lacks(end := min(job.done + known + job.ahead, job.limit)) > self.pages.free:
            last = max(self.running, key=_rank)
            self._preempt(last, step)
            if last is job:
                return False
        job.table.reserve(end)
        step.parts.append(Part(job, job.done, known, 0))
        return True

    def _preempt(self, job: Job, step: Step) -> None:
        """Take a running job's pages; it will begin again."""
        self.running.remove(job)
        job.table.close()
        job.done, job.shared, job.drafts = 0, 0, 0
        job.preempted += 1
        self.waiting.append(job)
        step.preempted.append(job)
        step.parts = [part for part in step.parts if part.job is not job]

    def _begin(self, job: Job, step: Step) -> bool:
        """Give a waiting job its place, if there are pages for all of its tokens; lower priorities give way."""
        found, end = job.table.open(job.tokens), min(len(job.tokens) + job.ahead, job.limit)
        while self._places() < job.samples or job.table.lacks(end) > self.pages.free:
            last = max(self.running, key=_rank, default=job)
            if last.priority >= job.priority:
                job.table.close()
                return False
            self._preempt(last, step)
        job.done = job.shared = found
        self.waiting.remove(job)
        self.running.append(job)
        step.begun.append(job)
        return True

    def _places(self) -> int:
        """How many more may run."""
        return self.most - sum(job.samples for job in self.running)

    def _count(self, step: Step) -> None:
        totals = self.totals
        totals.steps += bool(step.parts)
        totals.tokens += step.tokens
        totals.begun += len(step.begun)
        totals.preempted += len(step.preempted)
        totals.shared += sum(job.shared for job in step.begun)
        totals.together = max(totals.together, len(step.parts))

    def _turn(self, job: Job) -> tuple[int, int, int]:
        return -job.priority, self.served[job.client], job.number

    def _all(self) -> Iterator[Job]:
        yield from self.running
        yield from self.waiting


def _rank(job: Job) -> tuple[int, int]:
    """Who keeps its pages longest comes first."""
    return -job.priority, job.number


def _first(under_way: Job | None, waiting: Job | None) -> Job | None:
    """Of a prompt that is under way and one that waits: the second if its priority is higher."""
    if under_way is None or waiting is None:
        return under_way or waiting
    return waiting if waiting.priority > under_way.priority else under_way
