"""`cavelight experiment`: one of the report's claims in small. Runs side by side, then a page and a figure."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cavelight.cli.live import Pace, amount
from cavelight.cli.progress import REDRAW, screen, sentence_of
from cavelight.cli.screen import OUT, duration, say_json
from cavelight.errors import UserError
from cavelight.spec.events import Event, Note, Phase, Step

Listener = Callable[[str, Event | None], None]


def experiment(name: str, seeds: int, changes: Sequence[str], out: Path, runs: Path, as_json: bool) -> None:
    """Leaves NAME.md and NAME.png in `out` and the runs in `runs`. Finished runs are only read, others gone on with."""
    if seeds < 1:
        raise UserError("An experiment has one seed at least", got=f"--seeds {seeds}", do="give 3 or more")

    from cavelight.experiment.catalogue import entry
    from cavelight.experiment.page import write_page
    from cavelight.experiment.runs import ALL, go_through
    from cavelight.experiment.study import Study
    from cavelight.experiment.texts import resolved

    chosen = entry(name)
    with board(
        f"experiment {name}, {seeds} {'seed' if seeds == 1 else 'seeds'}, into {runs / name}", as_json
    ) as listen:
        study = Study.read(name, changes, lambda corpus: resolved(corpus, lambda event: listen(ALL, event)))
        outcome = go_through(study, seeds, runs, listen)
    told = chosen.tell(outcome)
    figure, page = out / f"{name}.png", out / f"{name}.md"
    chosen.draw(outcome, figure)
    options = [word for change in changes for word in ("--set", change)]
    command = shlex.join(["cavelight", "experiment", name, "--seeds", str(seeds), *options])
    write_page(outcome, told, figure, page, command)
    if as_json:
        found = {key: [dict(run.found) for run in each] for key, each in outcome.runs.items()}
        say_json({"kind": "result", "page": page, "figure": figure, "runs": found, "verdict": told.verdict})
        return
    table = Table(title=study.title, title_justify="left")
    for word in told.table[0]:
        table.add_column(word, overflow="fold")
    for row in told.table[1:]:
        table.add_row(*map(Text, row))  # brackets are no markup
    OUT.print(table)
    for sentence in told.verdict:
        OUT.print(Text(sentence), soft_wrap=True)
    OUT.print(f"wrote {page} and {figure}", soft_wrap=True)


@contextmanager
def board(title: str, as_json: bool) -> Iterator[Listener]:
    """A listener for many runs at a time: a line for each on a terminal, elsewhere all of them as one."""
    if as_json or not OUT.is_terminal:
        with screen(title, as_json) as listen:
            yield lambda name, event: listen(event) if event and is_for_all(name, event) else None
        return
    shown, last = Board(title), 0.0
    with Live(console=OUT, auto_refresh=False, vertical_overflow="crop") as live:

        def hear(name: str, event: Event | None) -> None:
            nonlocal last
            if isinstance(event, Note) and is_for_all(name, event):
                live.console.print(sentence_of(event), soft_wrap=True)
            shown.take(name, event)
            if time.monotonic() - last >= REDRAW:
                last = time.monotonic()
                live.update(shown.draw(), refresh=True)

        yield hear
        live.update(shown.draw(), refresh=True)


def is_for_all(name: str, event: Event) -> bool:
    """Whether an event tells of all runs, or is a run's last word, which begins with its name."""
    return not name or (isinstance(event, Note) and event.text.startswith(f"{name}:"))


@dataclass
class _Line:
    """What a run said last."""

    step: Step | None = None
    phase: Phase | None = None


class Board:
    """All runs that are under way, and how far all of them have come."""

    def __init__(self, title: str) -> None:
        self.title, self.pace, self.note = title, Pace(), ""
        self.lines: dict[str, _Line] = {}
        self.whole = Phase("preparing", 0, 0, "steps")

    def take(self, name: str, event: Event | None) -> None:
        """An event of the run of that name, None when it has ended; of all runs where there is no name."""
        if not name:
            if isinstance(event, Phase):
                self.whole, self.note = event, self.pace.note(event)
            return
        if event is None:
            self.lines.pop(name, None)
            return
        line = self.lines.setdefault(name, _Line())
        if isinstance(event, Step):
            line.step, line.phase = event, None
        elif isinstance(event, Phase):
            line.phase = event

    def draw(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        rate = sum(line.step.tokens_per_second for line in self.lines.values() if line.step)
        words = f"{amount(self.whole)}{self.note}" + (f", {rate:,.0f} tokens/s" if rate else "")
        table.add_row(Text(self.whole.name, style="bold"), _bar(self.whole.done, self.whole.total), words)
        for name, line in sorted(self.lines.items()):
            if line.phase:
                table.add_row(name, _bar(line.phase.done, line.phase.total), f"{line.phase.name}: {amount(line.phase)}")
            elif line.step:
                told = f"loss {line.step.loss:.3f}, {line.step.tokens_per_second:,.0f} tokens/s"
                left = f"{duration(line.step.seconds_left)} left"
                table.add_row(name, _bar(line.step.step, line.step.steps), f"{told}, {left}")
        return Panel(table, title=self.title, title_align="left", border_style="cyan")


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, width=24)
