"""A run that is killed again and again, beside one that is not: are they equal to the bit?

python -m bench.resume trains a small model twice by the command: once undisturbed, and once killed with SIGKILL at
random moments and continued each time. Some kills come while the process starts, some while it computes, some while it
writes a save. On the way one newest save is cut short, and one call meets a disk that holds no more. Then weights,
optimizer, average, data position, log and exported model are compared. Writes docs/results/resume.md.
"""

import argparse
import filecmp
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.provenance import commit, leave_with, machine, some
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.spec.recipe import Recipe
from cavelight.train.checkpoints import CHECKSUMS, VALUES, folder_of, saved_steps
from cavelight.train.metrics import OF_THE_CLOCK
from cavelight.train.optim import pick_dtype
from cavelight.train.state import RunFolder, read_metrics

MOMENTS = ("while it starts", "between saves", "during a save")
WEIGHTS = (0.1, 0.5, 0.4)  # how often each of them is chosen
GLANCE = 0.0005  # seconds between two looks whether a save has begun
FULL_BYTES = 200_000  # the largest file that the call on a full disk may write
RECIPE = """
[model]
preset = "nano"

[data]
row_length = 64

[train]
rows_per_step = 4
rows_per_microbatch = 1
ramp_from_rows = 1
ramp_share = 0.5
init_std = 0.05
learning_rate = 3e-3
warmup_steps = 10
bias_speed = 0.01
ema_decay = 0.99
evaluate_every = 25
evaluate_bytes = 2000
sample_tokens = 8
save_every = 4
"""


@dataclass
class Story:
    """What befell the run: kills by their moment, the steps at which they came, half-written saves that they left."""

    moments: Counter[str] = field(default_factory=Counter)
    steps: list[int] = field(default_factory=list)
    half_written: int = 0
    damaged: int = 0  # saves that a later call found damaged
    failed: int = 0  # saves that a full disk kept from being written


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", do="choose another folder with --folder; this script deletes its own")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        recipe = folder / "recipe.toml"
        recipe.write_text(f"{RECIPE}steps = {options.steps}\n", encoding="utf-8")
        changes = [part for change in options.set for part in ("--set", change)]
        whole, killed = RunFolder(folder / "whole"), RunFolder(folder / "killed")
        began = time.monotonic()
        start = call(recipe, whole, changes).wait_for_step()  # the tokens of the corpus are kept from here on
        start.finish()
        seconds, starting = time.monotonic() - start.stepped, start.stepped - began
        story = torment(recipe, killed, changes, options.kills, seconds, starting, random.Random(options.seed))
        differences = compare(whole, killed)
        called = list(sys.argv[1:] if arguments is None else arguments)
        text = report(whole, story, differences, seconds, called)
    finally:
        shutil.rmtree(folder)
    with file_beside(options.out) as scratch:
        scratch.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")
    return 1 if differences else 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill a training run many times, and compare it with one that lived.")
    parser.add_argument("--kills", type=some, default=50, help="SIGKILLs (default: 50)")
    parser.add_argument("--steps", type=some, default=400, help="optimizer steps of the run (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe of both runs"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/resume"), help="for the two runs; emptied at the end")
    parser.add_argument("--out", type=Path, default=Path("docs/results/resume.md"), help="the page to write")
    return parser.parse_args(arguments)


class Process:
    """One call of `cavelight train`, whose events are read as they come."""

    def __init__(self, command: Sequence[str], most_bytes: int | None) -> None:
        limit = None if most_bytes is None else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most_bytes,) * 2)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=limit, text=True)
        self.events: list[dict[str, Any]] = []
        self.stepped = 0.0  # when the first step was heard of
        self._first_step = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith("\n"):
                break  # a kill has cut it off
            self.events.append(json.loads(line))
            if self.events[-1]["kind"] in ("step", "result") and not self.stepped:
                self.stepped = time.monotonic()
                self._first_step.set()
        self._first_step.set()

    def wait_for_step(self) -> "Process":
        """Until it computes, or has ended."""
        self._first_step.wait()
        return self

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        code = self._end()
        if code == 0:
            raise UserError("The run was at its end before the last kill", do="give it more --steps")
        if code != -signal.SIGKILL:
            raise UserError("The training failed", got=f"exit code {code}")

    def finish(self) -> None:
        if code := self._end():
            raise UserError("The training failed", got=f"exit code {code}")

    def _end(self) -> int:
        code = self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


def call(recipe: Path, run: RunFolder, changes: Sequence[str], most_bytes: int | None = None) -> Process:
    """The command that begins the run, or goes on with it once there is something to go on with."""
    begin = [str(recipe), "--out", str(run.path), *changes]
    what = ["--resume", str(run.path)] if run.recipe.exists() else begin
    return Process([sys.executable, "-m", "cavelight", "train", *what, "--json"], most_bytes)


def torment(
    recipe: Path,
    run: RunFolder,
    changes: Sequence[str],
    kills: int,
    seconds: float,
    starting: float,
    chance: random.Random,
) -> Story:
    """Kill the run so many times and let it finish. `seconds` it takes to train, `starting` to come to its steps."""
    story, cut, full_at = Story(), False, kills // 2
    while (number := story.moments.total()) < kills:
        if number > kills // 3 and not cut and len(saved_steps(run.saves)) > 1:
            cut_short(run, chance)
            cut = True
        moment = chance.choices(MOMENTS, WEIGHTS)[0] if number != full_at else MOMENTS[1]
        process = call(recipe, run, changes, FULL_BYTES if number == full_at else None)
        wait_for(moment, process, run, seconds / (kills + 1), starting, chance)
        process.kill()
        story.moments[moment] += 1
        story.half_written += bool(list(run.path.glob("**/.step-*.part")))
        note(story, process)
    last = call(recipe, run, changes)
    last.finish()
    note(story, last)
    return story


def wait_for(
    moment: str, process: Process, run: RunFolder, span: float, starting: float, chance: random.Random
) -> None:
    """Until the kill is due. No call trains for much more than `span` seconds, so the run outlives all kills."""
    if moment == MOMENTS[0]:
        time.sleep(chance.uniform(0, starting))
        return
    process.wait_for_step()
    if moment == MOMENTS[1]:
        time.sleep(chance.uniform(0, span))
        return
    ends = time.monotonic() + span
    while time.monotonic() < ends and not any(run.saves.glob(".*.part")):
        time.sleep(GLANCE)
    time.sleep(chance.uniform(0, 0.02))  # somewhere between its first file and the rename


def cut_short(run: RunFolder, chance: random.Random) -> None:
    """Take the end off one file of the newest save."""
    newest = folder_of(run.saves, saved_steps(run.saves)[-1])
    file = chance.choice(sorted(newest.iterdir()))
    os.truncate(file, chance.randrange(file.stat().st_size))


def note(story: Story, process: Process) -> None:
    """Add what a call said to the story."""
    steps = [event["step"] for event in process.events if event["kind"] == "step"]
    story.steps.append(steps[-1] if steps else 0)
    told = [event["text"] for event in process.events if event["kind"] == "note"]
    story.damaged += sum("is damaged" in text for text in told)
    story.failed += sum("save failed" in text for text in told)


def compare(whole: RunFolder, killed: RunFolder) -> list[str]:
    """What differs between the two runs, apart from times; empty if nothing does."""
    differences = []
    if saved_steps(whole.saves) != saved_steps(killed.saves):
        return [f"saves: {saved_steps(whole.saves)} and {saved_steps(killed.saves)}"]
    pairs = [(folder_of(whole.saves, step), folder_of(killed.saves, step)) for step in saved_steps(whole.saves)]
    for one, other in [*pairs, (whole.model, killed.model), (whole.average, killed.average)]:
        names = {file.name for file in one.iterdir()} | {file.name for file in other.iterdir()}
        _, unlike, missing = filecmp.cmpfiles(one, other, names - {VALUES, CHECKSUMS}, shallow=False)
        differences += [f"{one.name}/{name}" for name in (*unlike, *missing)]
    for one, other in pairs:
        states = [without_clock(json.loads((folder / VALUES).read_bytes())) for folder in (one, other)]
        differences += [f"{one.name}/{VALUES}"] * (states[0] != states[1])
    lines = [[without_clock(line) for line in read_metrics(run.metrics)] for run in (whole, killed)]
    return differences + [whole.metrics.name] * (lines[0] != lines[1])


def without_clock(values: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the clock: times, and the log's length, since some times take more digits than others."""
    kept = {key: value for key, value in values.items() if key not in OF_THE_CLOCK | {"log"}}
    return {key: without_clock(value) if isinstance(value, dict) else value for key, value in kept.items()}


def report(whole: RunFolder, story: Story, differences: Sequence[str], seconds: float, called: Sequence[str]) -> str:
    """The page for docs/results."""
    recipe: Recipe = whole.read_recipe()
    lines, newest = read_metrics(whole.metrics), folder_of(whole.saves, saved_steps(whole.saves)[-1])
    size = sum(file.stat().st_size for file in newest.iterdir())
    kills = story.moments.total()
    verdict = f"NOT equal: {', '.join(differences)}" if differences else "Equal to the bit."
    moments = "\n".join(f"| {moment} | {story.moments[moment]} |" for moment in MOMENTS)
    compared = (
        "float32 weights, routing biases, both moments of AdamW, the weights' average, random state, place in the "
        "data, loss statistics, the exported models, and every line of the log with its losses, counts, evaluations "
        "and samples, apart from times"
    )
    parts = [
        "# A run that is killed",
        f"A run of {recipe.train.steps:,} steps (`{recipe.model.preset}`, a save of {size / 1e6:.1f} MB every "
        f"{recipe.train.save_every} steps, {seconds:,.0f} s of training undisturbed), and the same run killed with "
        f"SIGKILL {kills} times at random and continued. Compared: {compared}.",
        f"**{verdict}** {len(lines):,} lines of the log.",
        f"| killed | times |\n|---|--:|\n{moments}",
        f"{story.half_written} kills left a half-written save behind, which the next call removed. Before one call the "
        f"newest save was cut short: calls found {story.damaged} saves damaged, said so, and went on from the one "
        f"before. One call met a full disk: {story.failed} saves failed, and training went on.",
        f"Steps that the calls had reached when they ended: {', '.join(map(str, story.steps))}.",
        f"Command: `{shlex.join(['python', '-m', 'bench.resume', *called])}`  \nCommit: {commit()}  \n"
        f"Machine: {machine(pick_dtype(recipe.train.dtype))}",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    leave_with(main)
