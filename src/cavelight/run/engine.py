"""Many generations at once on one model: a step computes some tokens of each, over one paged latent cache.

Letters: T tokens of a step, of all sequences end to end, D hidden size, V vocabulary. What is computed when is the
scheduler's business (run/scheduler.py), where rows lie is the pages' (run/pages.py).
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.memory import check_memory
from cavelight.model.ports import Attend, Dispatch, GroupedDispatch
from cavelight.model.transformer import Transformer
from cavelight.run.generate import checked_drafts, checked_prompt, end_tokens
from cavelight.run.invariant import DispatchAlone, RowBlocks
from cavelight.run.pace import Pace
from cavelight.run.paged import PagedCache, Span
from cavelight.run.pages import Pages, Table
from cavelight.run.quick import quick, why_plain, without_native
from cavelight.run.request import Generation, Request
from cavelight.run.rows import CacheDtype, cache_dtype, row_bytes
from cavelight.run.scheduler import Job, Part, Scheduler, Totals
from cavelight.run.speculate import Chain, Drafter, Wish
from cavelight.run.stats import CANCELLED
from cavelight.spec.config import ModelConfig

PAGE = 32  # positions
WITH_MODULES, WITHOUT = 0, 1  # kinds of pages: whether they hold the MTP modules' rows


@dataclass(frozen=True)
class Load:
    """What an engine holds at a moment."""

    running: int
    waiting: int
    pages: int
    pages_held: int
    pages_known: int  # held by nobody, but found again if a prompt begins alike


class Engine:
    """Give it requests; every `step` brings all that run a piece further. Iterating over a generation makes steps too.

    memory: bytes of the cache, all of them taken now. budget: tokens of a step, drafts included; prompts are taken in
    pieces that fit beside what decodes. most: generations that run at once; more may wait, up to `queue`.
    cache: "auto" to keep latents as the weights are, "int8" in less memory (see rows.py).
    invariant: a request gives the same tokens alone and in any company, to the bit, at the price that every row of a
    step is computed in a way that knows nothing of the others (run/invariant.py).
    Raises UserError for a budget below `most`, if not even one page fits into the memory, and if that is more than the
    machine has.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        memory: int = 1 << 30,
        budget: int = 512,
        most: int = 32,
        queue: int = 4096,
        page: int = PAGE,
        cache: CacheDtype = "auto",
        invariant: bool = False,
        dispatch: Dispatch | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config, weight = model.config, model.lm_head.weight
        rows = cache_dtype(config, weight.dtype, cache)
        each = page_bytes(config, max(page, 1), rows)
        _check(memory=memory, budget=budget, most=most, queue=queue, page=page, page_bytes=each)
        self.model, self.config, self.queue, self.clock = quick(model), config, queue, clock
        self.invariant = invariant
        if invariant:
            without_native()  # half by one way and half by another would not be the same to the bit
        self.dispatch = DispatchAlone() if invariant else dispatch or GroupedDispatch()
        if weight.device.type == "cpu":
            check_memory(memory, "the engine's cache", "give it less")
        self.modules = config.num_nextn_predict_layers
        self.cache = PagedCache(config, memory // each, page, rows, weight.device)
        self.scheduler = Scheduler(Pages(memory // each, page, lookahead=(self.modules, 0)), budget, most)
        self.drafter = Drafter(self.model, self._attend_at, self.dispatch, self.modules) if self.modules else None
        self.pace = Pace(config)
        self._jobs: dict[Job, Generation] = {}
        self._coming: deque[tuple[list[Generation], int]] = deque()
        self._leaving: deque[Generation] = deque()
        self._lock, self._stepping = RLock(), False
        self._broken: BaseException | None = None  # by what a step was

    def submit(self, request: Request) -> list[Generation]:
        """One generation for each of the request's samples. May be called from any thread.

        Raises UserError for a prompt that cannot be used, for a request that could never fit, if too many wait, and
        after a step that was broken off.
        """
        self._check_whole()
        prompt, limit = self._checked(request)
        drafts = self.pace.most if request.drafts == "auto" else min(request.drafts, limit, self.scheduler.budget)
        stop_ids = frozenset(end_tokens(self.config) if request.stop_ids is None else request.stop_ids)
        made = [
            Generation(request, prompt, stop_ids, number, drafts, self.step, self.cancel, self.clock())
            for number in range(request.samples)
        ]
        for generation in made:
            generation.stats.off = None if self.modules else "the model has no MTP module"
            if request.max_new_tokens == 0:
                generation.end("limit of new tokens")
        self._coming.append((made, limit))
        return made

    def cancel(self, generation: Generation, why: str = CANCELLED) -> None:
        """End a generation, whatever it is at. May be called from any thread."""
        if generation.end(why):
            self._leaving.append(generation)

    def step(self) -> bool:
        """Compute something for whoever is in turn; False if nobody wants anything.

        Raises UserError if it is called out of a step, by a hook, and after a step that was broken off in its middle:
        by an error of the model itself, or by Ctrl-C. The engine is of no more use then.
        """
        with self._lock, torch.inference_mode():
            self._check_whole()
            if self._stepping:
                raise UserError("A hook called the engine that called it", why="a step has to end before the next one")
            self._stepping = True
            try:
                return self._step()
            except BaseException as error:  # Ctrl-C too
                self._broken = error
                raise
            finally:
                self._stepping = False

    def _check_whole(self) -> None:
        if self._broken is not None:
            got, why = repr(self._broken), "what its sequences had come to is not known"
            raise UserError("The engine was broken off in the middle of a step", got=got, why=why, do="make a new one")

    def _step(self) -> bool:
        while self._coming:
            self._add(*self._coming.popleft())
        while self._leaving:
            self._retire(self._leaving.popleft())
        step = self.scheduler.plan()
        for job in step.preempted:
            self._jobs[job].lose()
        for job in step.begun:
            self._jobs[job].begin(job, self.clock())
        if step.parts:
            self._compute(step.parts)
        return bool(step.parts)

    def run(self) -> None:
        """Steps until nobody wants anything."""
        while self.step():
            pass

    @property
    def totals(self) -> Totals:
        """What its steps did, since it began."""
        return self.scheduler.totals

    @property
    def load(self) -> Load:
        scheduler, pages = self.scheduler, self.scheduler.pages
        waiting = len(scheduler.waiting) + len(self._coming)
        return Load(len(scheduler.running), waiting, pages.count, pages.held, pages.idle)

    def _checked(self, request: Request) -> tuple[list[int], int]:
        """The prompt, and the most positions that will be computed."""
        config, pages, most = self.config, self.scheduler.pages, self.scheduler.most
        prompt = checked_prompt(config, request.prompt)
        limit = min(len(prompt) + max(request.max_new_tokens, 1) - 1, config.max_position_embeddings)
        if not self.scheduler.fits(limit):
            raise UserError(
                "The request does not fit into the engine's cache",
                got=f"{len(prompt)} tokens and up to {request.max_new_tokens} new ones",
                why=f"the cache has room for {pages.count * pages.size:,} positions",
                do="ask for fewer, or give the engine more memory",
            )
        if request.samples > most:
            raise UserError("These are too many samples", got=str(request.samples), why=f"{most} can run at once")
        checked_drafts(config, request.drafts)
        if self.load.waiting >= self.queue:
            raise UserError("The engine is full", why=f"{self.queue} requests wait already", do="try again later")
        return prompt, limit

    def _add(self, made: list[Generation], limit: int) -> None:
        wanted = [generation for generation in made if not generation.stats.finish]  # else cancelled before
        if not wanted:
            return
        first, drafts = wanted[0], wanted[0].stats.drafts
        job = Job(
            list(first.prompt),
            limit,
            Table(self.scheduler.pages, WITH_MODULES if drafts else WITHOUT),
            first.request.priority,
            first.request.client,
            samples=len(wanted),
            ahead=max(0, drafts - self.modules),
        )
        first.job, first.siblings = job, wanted[1:]
        self._jobs[job] = first
        self.scheduler.add(job)

    def _end(self, generation: Generation, why: str, error: Exception | None = None) -> None:
        """Whatever it is at: end it, and let its siblings go on."""
        if generation.end(why, error):
            self._retire(generation)

    def _retire(self, generation: Generation) -> None:
        """Give away the place of one that has ended."""
        job, siblings = generation.job, generation.siblings
        if job is None:
            return
        generation.stats.without_native = why_plain(self.model, self.dispatch)
        generation.job, generation.siblings = None, []
        siblings = [sibling for sibling in siblings if not sibling.stats.finish]
        if siblings:  # the prompt is not through: the next one takes its place
            heir = siblings[0]
            heir.job, heir.siblings, heir.chain = job, siblings[1:], generation.chain
            job.samples = len(siblings)
            self._jobs[job] = heir
        else:
            del self._jobs[job]
            self.scheduler.remove(job)
        generation.lose()

    def _compute(self, parts: Sequence[Part]) -> None:
        """One pass of the trunk over all parts, what follows from it, and the drafts for the next."""
        started = self.clock()
        spans = [Span(part.job.table.pages, part.start, part.count) for part in parts]
        hidden, logits = self._trunk(parts, spans)
        for part, hidden_TD, logits_TV in zip(parts, hidden, logits, strict=True):
            self._advance(part, hidden_TD, logits_TV, alone=len(parts) == 1)
        decided = self.clock()
        going = [generation for generation in self._jobs.values() if generation.chain.unseen]
        guesses = self._draft(going)
        if all(part.known == 1 for part in parts):
            self.pace.note(sum(part.count for part in parts), decided - started, guesses, self.clock() - decided)
        for part, logits_TV in zip(parts, logits, strict=True):
            if logits_TV is not None and part.job.done > part.start:  # else it ended in an error
                self._separate(self._jobs[part.job], part, logits_TV)
        for generation in going:
            self._keep(generation)

    def _trunk(self, parts: Sequence[Part], spans: Sequence[Span]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Of each part its raw hidden states [T, D], and logits [drafts + 1, V] if something follows from it."""
        device = self.model.lm_head.weight.device
        tokens = [token for part in parts for token in self._tokens(part)]
        positions_T = torch.cat([torch.arange(span.start, span.end) for span in spans]).to(device)
        with RowBlocks() if self.invariant else nullcontext():
            attend = self.cache.at(spans, alone=self.invariant)
            hidden_TD, _ = self.model(torch.tensor(tokens, device=device), positions_T, attend, self.dispatch)
            hidden = hidden_TD.split([span.count for span in spans])
            rows = [states[part.known - 1 :] for part, states in zip(parts, hidden, strict=True) if part.decides]
            heads = iter(self.model.head(torch.cat(rows)).split([len(some) for some in rows]) if rows else ())
        return list(hidden), [next(heads) if part.decides else None for part in parts]

    def _tokens(self, part: Part) -> list[int]:
        guesses = self._jobs[part.job].guesses[: part.drafts]
        return part.job.tokens[part.start : part.start + part.known] + guesses

    def _advance(self, part: Part, hidden_TD: Tensor, logits_TV: Tensor | None, alone: bool) -> None:
        """What a computed part makes certain."""
        job, new = part.job, list[int]()
        generation = self._jobs[job]
        guesses, generation.guesses = generation.guesses[: part.drafts], []
        if logits_TV is not None:
            try:
                new, _ = generation.chooser.tokens(logits_TV, job.tokens, guesses)
            except Exception as error:  # the user's hook may raise anything: it ends this generation, no other
                self._end(generation, "error", error)
                return
        self.scheduler.advance(part, new)
        chain, states_TD = generation.chain, hidden_TD[: part.known + max(0, len(new) - 1)]
        chain.unseen.append(states_TD)
        if generation.siblings and generation.stats.drafts:
            chain.tail = [torch.cat([*chain.tail, states_TD])[-self.modules :]]
        if logits_TV is not None and not generation.stats.finish:
            generation.note(guesses, new, self.clock(), alone)
            generation.take(new, logits_TV, self.config.max_position_embeddings)

    def _separate(self, generation: Generation, part: Part, logits_TV: Tensor) -> None:
        """The other samples begin where the prompt ends, each with its own choice of what follows.

        The modules' last rows have seen the first sample's choice: they are made anew, from the trunk's last states.
        """
        job, siblings, generation.siblings = part.job, generation.siblings, []
        tokens, tail, generation.chain.tail = job.tokens[: part.start + part.known], generation.chain.tail, []
        start = job.done - sum(map(len, tail))
        for sibling in siblings:
            try:
                new = [] if sibling.stats.finish else sibling.chooser.tokens(logits_TV, tokens, [])[0]
            except Exception as error:  # the hook's, as above
                self._end(sibling, "error", error)
            if sibling.stats.finish:
                job.samples -= 1
                continue
            sibling.job, copies = self.scheduler.fork(job, tokens + new, start)
            self.cache.copy(copies)
            if sibling.job.done:  # else it waits for pages
                sibling.chain = Chain(sibling.job.table, start, start, list(tail))
            self._jobs[sibling.job], sibling.began = sibling, generation.began
            sibling.note([], new, self.clock(), alone=False)
            sibling.take(new, logits_TV, self.config.max_position_embeddings)
            self._keep(sibling)

    def _draft(self, going: Sequence[Generation]) -> int:
        """Keep the modules in step with the trunk, and let them guess; how many guesses that is."""
        if self.drafter is None:
            return 0
        drafting = [generation for generation in going if generation.stats.drafts]
        company = sum(job.left == 1 for job in self.scheduler.running)
        wishes = [self._wish(generation, company) for generation in drafting]
        if not wishes:
            return 0
        with RowBlocks() if self.invariant else nullcontext():
            proposed = self.drafter.propose(wishes)
        for generation, guesses in zip(drafting, proposed, strict=True):
            generation.guesses = guesses
            if generation.job is not None:
                generation.job.drafts = len(guesses)
        return sum(map(len, proposed))

    def _wish(self, generation: Generation, company: int) -> Wish:
        job = generation.job
        assert job is not None
        drafts = 0
        # Siblings will begin with choices of their own; who has ended just leaves true rows to others.
        if job.left == 1 and not generation.siblings and not generation.stats.finish:
            room = min(generation.room - 1, job.limit - len(job.tokens), self.scheduler.budget - company)
            auto = generation.request.drafts == "auto"
            many = (
                self.pace.drafts(generation.chances, len(generation.tokens), company)
                if auto
                else generation.stats.drafts
            )
            drafts = max(0, min(many, room))
        return Wish(generation.chain, job.tokens, drafts, generation.guess, generation.stop_ids)

    def _attend_at(self, pieces: Sequence[tuple[Chain, int, int]]) -> Attend:
        spans = [Span(chain.home.pages, first, stop - first) for chain, first, stop in pieces]
        return self.cache.at(spans, alone=self.invariant)

    def _keep(self, generation: Generation) -> None:
        """Let others find what was computed; and if it has ended, give its place away."""
        job = generation.job
        if job is None:
            return
        if generation.stats.drafts:
            job.table.fill(job.tokens[: generation.chain.seen + 1])
        else:
            generation.chain.unseen = []
            job.table.fill(job.tokens[: job.done])
        if generation.failed:
            generation.end("error", generation.failed)
        if generation.stats.finish:
            self._retire(generation)


def _check(**options: int) -> None:
    """Raises UserError for options of an engine that cannot be used."""
    wrong = [f"{name} = {value!r}" for name, value in options.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise UserError("The engine cannot be made", got=", ".join(wrong), why="all are whole numbers from 1 on")
    if options["budget"] < options["most"]:
        raise UserError(
            "The engine's budget is too small",
            got=f"{options['budget']} tokens a step, {options['most']} generations at once",
            why="each of them may want a token in every step",
        )
    if options["memory"] < options["page_bytes"]:
        raise UserError(
            "The engine's memory is too small",
            got=f"{options['memory']:,} bytes",
            why=f"one page of {options['page']} positions takes {options['page_bytes']:,}",
        )


def page_bytes(config: ModelConfig, page: int, dtype: torch.dtype) -> int:
    """Of a page of so many positions, all layers' rows."""
    return config.num_layers_with_mtp * page * row_bytes(config, dtype)
