"""The scheduler: whatever comes, steps stay within the budget, nobody's pages are touched, and everybody is served."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from cavelight.run.pages import Pages, Table
from cavelight.run.scheduler import Job, Scheduler, Step


class World:
    """Random requests, computed by a random model: drafts hold by chance."""

    def __init__(self, seed: int, pages: int, size: int, budget: int, most: int) -> None:
        self.source = random.Random(seed)
        self.scheduler = Scheduler(Pages(pages, size, lookahead=(1,)), budget, most)
        self.alive: dict[Job, int] = {}  # the length at which each ends
        self.finished = self.cancelled = self.preempted = self.shared = 0

    def ask(self) -> None:
        source, scheduler = self.source, self.scheduler
        prompt = [source.randrange(2) for _ in range(source.randrange(1, 20))]
        limit = len(prompt) + source.randrange(0, 12)
        if not scheduler.fits(limit):
            return
        job = Job(
            prompt,
            limit,
            Table(scheduler.pages),
            priority=source.randrange(3),
            client=source.choice("ab"),
            samples=source.randrange(1, min(3, scheduler.most) + 1),
            ahead=source.randrange(3),
        )
        self.alive[job] = limit + 1
        scheduler.add(job)

    def step(self) -> Step:
        scheduler = self.scheduler
        step = scheduler.plan()
        self.check(step)
        self.preempted += len(step.preempted)
        self.shared += sum(job.shared for job in step.begun)
        for part in step.parts:
            job = part.job
            new = [self.source.randrange(2) for _ in range(self.source.randrange(part.drafts + 1) + 1)]
            siblings = job.samples - 1 if part.decides else 0
            before = list(job.tokens)
            scheduler.advance(part, new if part.decides else [])
            for _ in range(siblings):
                twin, _ = scheduler.fork(job, [*before, self.source.randrange(2)], max(part.start, job.done - 1))
                self.alive[twin] = self.alive[job]
                twin.table.fill(twin.tokens[: max(part.start, twin.done - 1) + 1] if twin.done else [])
            job.table.fill(job.tokens[: job.done + 1])
            if part.decides and job.samples == 1:
                room = min(self.alive[job] - len(job.tokens) - 1, job.limit - len(job.tokens))
                job.drafts = max(0, min(self.source.randrange(4), room)) if job.left == 1 else 0
        for job in [job for job in self.alive if len(job.tokens) >= self.alive[job]]:
            self.end(job)
            self.finished += 1
        return step

    def end(self, job: Job) -> None:
        del self.alive[job]
        self.scheduler.remove(job)

    def check(self, step: Step) -> None:
        scheduler, pages = self.scheduler, self.scheduler.pages
        assert step.tokens <= scheduler.budget
        assert sum(job.samples for job in scheduler.running) <= scheduler.most
        assert set(self.alive) == {*scheduler.running, *scheduler.waiting}
        assert len({part.job for part in step.parts}) == len(step.parts)
        placed = {part.job for part in step.parts}
        assert all(job in placed for job in scheduler.running if job.left == 1), "one that decodes got no token"
        for part in step.parts:
            job, size = part.job, pages.size
            assert part.start == job.done and part.known >= 1 and part.count <= job.limit - job.done
            assert part.drafts == 0 or part.decides
            written = range(part.start // size, -(-(part.start + part.count) // size))
            for number in written:
                assert pages.holders[job.table.pages[number]] == 1 and not pages.is_known(job.table.pages[number])
        holders = Counter(page for job in scheduler.running for page in job.table.pages)
        assert pages.holders == [holders[page] for page in range(pages.count)]
        assert bool(step.parts) == bool(self.alive), "jobs, but nothing to do"


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    pages=st.integers(2, 30),
    size=st.integers(1, 5),
    most=st.integers(1, 5),
    spare=st.integers(0, 20),
)
def test_any_workload_is_served(seed: int, pages: int, size: int, most: int, spare: int) -> None:
    world = World(seed, pages, size, budget=most + spare, most=most)
    for _ in range(40):
        if world.source.random() < 0.6:
            world.ask()
        world.step()
        if world.alive and world.source.random() < 0.1:
            world.end(world.source.choice(list(world.alive)))
            world.cancelled += 1
    steps = 0
    while world.alive:
        world.step()
        steps += 1
        assert steps < 5000, "it never ends"
    assert world.scheduler.pages.held == 0 and not world.scheduler.served


def test_the_workloads_meet_what_they_are_for() -> None:
    world = World(seed=3, pages=12, size=3, budget=16, most=4)
    for _ in range(400):
        world.ask()
        world.step()
        if world.source.random() < 0.1:
            world.end(world.source.choice(list(world.alive)))
    assert world.finished > 50 and world.preempted > 20 and world.shared > 50


def ask(scheduler: Scheduler, length: int, new: int = 4, **kind: object) -> Job:
    job = Job(list(range(length)), length + new, Table(scheduler.pages), **kind)  # type: ignore[arg-type]
    scheduler.add(job)
    return job


def advance(scheduler: Scheduler, step: Step) -> None:
    for part in step.parts:
        scheduler.advance(part, [7] if part.decides else [])


def test_prompts_come_in_pieces_beside_what_decodes() -> None:
    scheduler = Scheduler(Pages(40, 4), budget=8, most=4)
    short, long = ask(scheduler, 3), ask(scheduler, 30)
    counts = []
    for _ in range(4):
        step = scheduler.plan()
        counts.append({part.job: part.count for part in step.parts})
        advance(scheduler, step)
    assert counts == [{short: 3, long: 5}, {short: 1, long: 7}, {short: 1, long: 7}, {short: 1, long: 7}]


def test_a_higher_priority_goes_first_and_takes_the_pages_it_needs() -> None:
    scheduler = Scheduler(Pages(4, 4), budget=32, most=4)
    low = ask(scheduler, 12)
    advance(scheduler, scheduler.plan())
    high = ask(scheduler, 8, priority=1)
    step = scheduler.plan()
    assert step.preempted == [low] and [part.job for part in step.parts] == [high]
    assert low in scheduler.waiting and low.done == 0 and len(low.tokens) == 13


def test_of_equal_priority_who_was_served_least_goes_first() -> None:
    scheduler = Scheduler(Pages(100, 4), budget=12, most=1)
    greedy = [ask(scheduler, 10, client="greedy") for _ in range(3)]
    modest = ask(scheduler, 2, client="modest")
    advance(scheduler, scheduler.plan())
    scheduler.remove(greedy[0])
    step = scheduler.plan()
    assert [part.job for part in step.parts] == [modest]


def test_who_comes_late_gets_no_credit_for_it() -> None:
    scheduler = Scheduler(Pages(100, 4), budget=12, most=2)
    ask(scheduler, 10, client="old")
    advance(scheduler, scheduler.plan())
    ask(scheduler, 2, client="new")
    assert scheduler.served == {"old": 10, "new": 10}


def test_drafts_are_left_out_before_anybody_gives_way() -> None:
    scheduler = Scheduler(Pages(4, 2), budget=16, most=2)
    one, two = ask(scheduler, 3, new=1), ask(scheduler, 3, new=4)
    advance(scheduler, scheduler.plan())
    two.drafts = 3
    step = scheduler.plan()
    assert step.preempted == [] and {part.job: part.drafts for part in step.parts} == {one: 0, two: 0}


def steps_until(scheduler: Scheduler, job: Job, most: int = 50) -> int:
    """Steps until a job's prompt is through; others may go on for ever."""
    for number in range(1, most + 1):
        step = scheduler.plan()
        advance(scheduler, step)
        if any(part.job is job and len(job.tokens) == part.start + part.known + 1 for part in step.parts):
            return number
    return most + 1


def test_a_higher_priority_does_not_wait_for_a_long_prompt() -> None:
    scheduler = Scheduler(Pages(300, 4), budget=16, most=4)
    long = ask(scheduler, 800)
    advance(scheduler, scheduler.plan())
    assert steps_until(scheduler, ask(scheduler, 8, priority=5)) == 1 and long.done == 24


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    scheduler = Scheduler(Pages(300, 4), budget=16, most=2)
    low = [ask(scheduler, 3, new=100) for _ in range(2)]
    advance(scheduler, scheduler.plan())
    high = ask(scheduler, 3, new=2, priority=1)
    step = scheduler.plan()
    assert step.preempted == [low[1]] and {part.job for part in step.parts} == {low[0], high}


def test_drafts_of_others_hold_no_prompt_up() -> None:
    scheduler = Scheduler(Pages(300, 4), budget=8, most=4)
    drafting = ask(scheduler, 3, new=100)
    advance(scheduler, scheduler.plan())
    drafting.drafts = 7
    late = ask(scheduler, 6)
    step = scheduler.plan()
    assert {part.job: (part.known, part.drafts) for part in step.parts} == {drafting: (1, 1), late: (6, 0)}


def test_drafts_count_as_what_a_client_was_served() -> None:
    scheduler = Scheduler(Pages(100, 4), budget=12, most=2)
    job = ask(scheduler, 3, new=9, client="drafting")
    advance(scheduler, scheduler.plan())
    job.drafts = 2
    advance(scheduler, scheduler.plan())
    assert scheduler.served == {"drafting": 3 + 1 + 2}


def test_of_equal_priority_a_prompt_under_way_is_finished_first() -> None:
    scheduler = Scheduler(Pages(100, 4), budget=8, most=4)
    long = ask(scheduler, 20)
    advance(scheduler, scheduler.plan())
    late = ask(scheduler, 3)
    step = scheduler.plan()
    assert [(part.job, part.known) for part in step.parts] == [(long, 8)] and late in scheduler.waiting


def test_drafts_wait_until_all_that_is_known_is_computed() -> None:
    scheduler = Scheduler(Pages(100, 4), budget=8, most=4)
    job = ask(scheduler, 12)
    job.drafts = 2
    assert [(part.known, part.drafts) for part in scheduler.plan().parts] == [(8, 0)]


def test_a_prompt_begins_only_where_there_is_room_for_its_drafts_too() -> None:
    """Else it would begin and give way at once, step after step."""
    scheduler = Scheduler(Pages(5, 4), budget=32, most=4)
    ask(scheduler, 7, new=1)
    advance(scheduler, scheduler.plan())
    late = ask(scheduler, 12, new=8, ahead=4)
    step = scheduler.plan()
    assert step.begun == step.preempted == [] and late in scheduler.waiting
