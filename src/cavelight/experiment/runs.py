"""Runs side by side, each in a process of its own with one thread; finished ones are only read."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.experiment.study import Outcome, Run, Study
from cavelight.spec.events import Event, Note, Phase, Step
from cavelight.spec.recipe import Recipe
from cavelight.train.prepare import prepare
from cavelight.train.state import RunFolder

FOUND = "found.json"  # beside a run's other files: what the experiment read of it when it was finished
FAILURE = "failure.txt"  # what a run's process said when it ended by a mistake that is no user's
WORKER = (sys.executable, "-m", "cavelight.experiment.worker")
PATIENCE = 60.0  # seconds that runs have to save themselves when all is stopped
Listener = Callable[[str, Event | None], None]  # a run's name and what it says, None when it has ended
ALL = ""  # in place of a name: the event is about all runs


@dataclass(frozen=True)
class Job:
    """One run to be made, or to be gone on with: what the process gets that makes it."""

    study: str
    label: str
    recipe: Recipe
    folder: Path

    @property
    def steps(self) -> int:
        assert self.recipe.train.steps is not None
        return self.recipe.train.steps


@dataclass
class Started:
    """A job's process. `failure` is what it said before it ended, if that was a mistake of the user's."""

    job: Job
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    step: int = 0
    failure: UserError | None = None


def go_through(study: Study, seeds: int, runs: Path, on_event: Listener, cores: int | None = None) -> Outcome:
    """Make whatever runs of the study are missing, one a core at a time, and read them all.

    Raises UserError for a folder that holds a run of another recipe, for runs of which some learnt from other text than
    the rest, and when runs have failed: after the others.
    """
    jobs = {
        (variant.key, seed): Job(
            study.name,
            f"{variant.key}-{seed}",
            variant.seeded(seed),
            runs / study.name / f"{variant.key}-{seed}",
        )
        for variant in study.variants
        for seed in range(seeds)
    }
    missing = [job for job in jobs.values() if not _is_finished(job)]
    missing.sort(key=lambda job: job.recipe.train.seed)  # so that one seed of everything is there early
    _prepare(missing, on_event)
    _Pool(missing, cores or os.cpu_count() or 1, on_event).run()
    found = {place: json.loads((job.folder / FOUND).read_text(encoding="utf-8")) for place, job in jobs.items()}
    _check_text({jobs[place].label: each for place, each in found.items()})
    return Outcome(
        study,
        {
            variant.key: [
                Run(seed, RunFolder(jobs[variant.key, seed].folder), found[variant.key, seed]) for seed in range(seeds)
            ]
            for variant in study.variants
        },
    )


def _is_finished(job: Job) -> bool:
    folder = RunFolder(job.folder)
    if folder.holds_a_run and folder.read_recipe() != job.recipe:
        raise UserError(
            f"{job.folder} holds a run of another recipe",
            why="the table would mix what does not belong together",
            do="remove that folder, or choose another one with --runs",
        )
    return folder.holds_a_run and (job.folder / FOUND).is_file()


def _check_text(found: Mapping[str, Mapping[str, Any]]) -> None:
    """A recipe names its text, which may have changed between two runs."""
    of_text: dict[str, list[str]] = {}
    for label, each in found.items():
        of_text.setdefault(json.dumps(each.get("text")), []).append(label)
    if len(of_text) > 1:
        *_, fewest = sorted(of_text.values(), key=len, reverse=True)
        raise UserError(
            "The corpus has changed between the runs",
            got=f"other text in {', '.join(fewest)} than in the rest",
            why="the table would mix what does not belong together",
            do="remove the folders of the older ones, or choose another one with --runs",
        )


def _prepare(jobs: Sequence[Job], on_event: Listener) -> None:
    """Tokenise once, before runs that need the same begin side by side."""
    seen = set()
    for job in jobs:
        data = (job.recipe.data.model_dump_json(), job.recipe.config.vocab_size)
        if data not in seen:
            seen.add(data)
            prepare(job.recipe, lambda event: on_event(ALL, event))


class _Pool:
    """As many processes as cores until no job is left."""

    def __init__(self, jobs: Sequence[Job], cores: int, on_event: Listener) -> None:
        self.waiting, self.cores, self.on_event = deque(jobs), cores, on_event
        self.running: dict[str, Started] = {}
        self.said: SimpleQueue[tuple[str, Event | UserError | None]] = SimpleQueue()
        self.ended, self.total = 0, sum(job.steps for job in jobs)
        self.failed: list[str] = []

    def run(self) -> None:
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.cores:
                    self._start(self.waiting.popleft())
                self._hear(*self.said.get())
        finally:
            self._stop()
        if self.failed:
            count = "A run" if len(self.failed) == 1 else f"{len(self.failed)} runs"
            raise UserError(f"{count} failed", got="; ".join(self.failed), do="the same command tries again")

    def _start(self, job: Job) -> None:
        errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process runs)
        process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is ours: each run is then told once to save itself
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as order:  # one that died at once: `_end` tells of it
            pickle.dump(job, order)
        self.running[job.label] = Started(job, process, errors)
        threading.Thread(target=self._listen, args=(job.label, process.stdout), daemon=True).start()

    def _listen(self, label: str, told: IO[bytes]) -> None:
        """Pass on what a process says, and None when it has ended."""
        try:
            while True:
                self.said.put((label, pickle.load(told)))
        except (EOFError, pickle.UnpicklingError):  # the latter of a process killed in the middle of a word
            self.said.put((label, None))

    def _hear(self, label: str, event: Event | UserError | None) -> None:
        started = self.running[label]
        if event is None:
            self._end(started)
        elif isinstance(event, UserError):
            started.failure = event
        else:
            self.on_event(label, event)
            if isinstance(event, Step):
                started.step = event.step
                done = self.ended + sum(other.step for other in self.running.values())
                self.on_event(ALL, Phase("all runs", done, self.total, "steps"))

    def _end(self, started: Started) -> None:
        label = started.job.label
        del self.running[label]
        self.ended += started.job.steps
        with started.process as process, started.errors as errors:
            if code := process.wait():
                errors.seek(0)
                told = errors.read().decode(errors="replace").strip()
                why = started.failure or _last_line(told, started.job.folder) or f"it ended with {code}"
                self.failed.append(f"{label}: {why}")
                self.on_event(ALL, Note(self.failed[-1]))
        self.on_event(label, None)

    def _stop(self) -> None:
        """Tell the runs that are left to save themselves, and wait until they have."""
        for started in self.running.values():
            started.process.send_signal(signal.SIGTERM)
        for started in self.running.values():
            with started.process as process, started.errors:
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()


def _last_line(told: str, folder: Path) -> str:
    """Of what a process wrote to its standard error; where there is more, such as a traceback, it goes into a file."""
    *above, last = told.splitlines() or [""]
    if not above:
        return last
    with file_beside(folder / FAILURE) as scratch:
        scratch.write_text(told + "\n", encoding="utf-8")
    return f"{last} ({folder / FAILURE} has all of it)"
