"""The live screen of long work: what was heard so far as one panel, whose height stays and whose lines never wrap."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from cavelight.cli.screen import OUT, duration, sparkline
from cavelight.spec.events import Evaluated, Event, Note, Phase, Sampled, Saved, Step

EVEN = 0.5  # a MaxVio above this is shown as a warning
NAMES, VALUES = 9, 9  # characters of the two columns left of a row's picture
WORDS = 28  # characters left for a row's words
WIDEST = 60  # characters of a row's picture, at most
SLIM = 50  # characters inside the panel, under which words give way


@dataclass
class History:
    """A curve of any length in little memory: beyond `most` points it keeps every second one, then every fourth …"""

    most: int = 256
    values: list[float] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, value: float) -> None:
        if self.seen % self.stride == 0:
            self.values.append(value)
        self.seen += 1
        if len(self.values) > self.most:
            self.values, self.stride = self.values[::2], self.stride * 2


class Pace:
    """How fast a phase goes and how long it will: measured from where it began here, which need not be zero."""

    def __init__(self) -> None:
        self._name: str | None = None

    def note(self, now: Phase) -> str:
        """`, 120 MB/s, 7 s left`, as far as that can be said."""
        if now.name != self._name:
            self._name, self._first, self._began = now.name, now.done, time.monotonic()
        gone, done = time.monotonic() - self._began, now.done - self._first
        if not done or gone < 1:
            return ""
        rate = f", {done / gone / 1e6:,.0f} MB/s" if now.unit == "B" else ""
        return rate + (f", {duration(gone / done * (now.total - now.done))} left" if now.done < now.total else "")


def amount(phase: Phase) -> str:
    """7 of 12 files, 1.5 of 20.0 GB."""
    if phase.unit == "B":
        size, unit = (1e9, "GB") if phase.total >= 1e10 else (1e6, "MB")
        return f"{phase.done / size:.1f} of {phase.total / size:.1f} {unit}"
    return f"{phase.done:,} of {phase.total:,} {phase.unit}"


@dataclass(frozen=True)
class _Box:
    """A frame around lines that fill its width. rich's own Panel would measure and wrap them once more, in vain."""

    title: str
    lines: Sequence[Text]
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        edge = Style(color="cyan")
        yield Segment(f"╭─ {self.title} {'─' * (self.width - cell_len(self.title) - 1)}╮\n", edge)
        for line in self.lines:
            yield Segment("│ ", edge)
            yield from line.render(console)
            yield Segment(" │\n", edge)
        yield Segment(f"╰{'─' * (self.width + 2)}╯", edge)


class Picture:
    """What was heard so far. Rows come when there is first something for them, and stay."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.step: Step | None = None
        self.looks: list[Evaluated] = []
        self.samples: list[Sampled] = []
        self.phase: Phase | None = None
        self.note = ""
        self.losses, self.mtp_losses, self.norms, self.speeds = History(), History(), History(), History()
        self.began, self.saved, self.saved_step = time.monotonic(), math.nan, 0
        self.pace, self.pace_note = Pace(), ""

    def take(self, event: Event) -> None:
        match event:
            case Step():
                self._take_step(event)
            case Evaluated():
                self.looks.append(event)
                self.phase = None
            case Sampled():
                self.samples.append(event)
            case Saved():
                self.saved, self.saved_step = time.monotonic(), self.step.step if self.step else 0
            case Note(text):
                self.note = text
            case Phase():
                self.phase, self.pace_note = event, self.pace.note(event)

    def _take_step(self, now: Step) -> None:
        if self.step is None:
            self.began, self.note = time.monotonic(), ""
        self.step, self.phase = now, None
        self.losses.add(now.loss)
        self.mtp_losses.add(now.mtp_loss)
        self.norms.add(now.grad_norm)
        self.speeds.add(now.tokens_per_second)

    def draw(self) -> RenderableType:
        width = max(OUT.width - 4, 16)
        lines = [*self._run(self.step, width), self._last(width)] if self.step else [self._last(width)]
        for line in lines:
            line.truncate(width, overflow="ellipsis", pad=True)
        title = Text(self.title)
        title.truncate(width - 2, overflow="ellipsis")
        return _Box(title.plain, lines, width)

    def _run(self, now: Step, width: int) -> list[Text]:
        gone = duration(time.monotonic() - self.began)
        left = f"{duration(now.seconds_left)} left"
        words = left if width < 70 else f"{gone} gone, {left}"
        share = now.step / now.steps if now.steps else 0.0
        return [_bar(f"step {now.step:,} of {now.steps:,}", share, words, width), Text(), *self._rows(now, width)]

    def _rows(self, now: Step, width: int) -> list[Text]:
        rows = [_row(width, "loss", f"{now.loss:.3f}", self.losses.values, "nats per token")]
        if now.mtp_loss:
            rows.append(_row(width, "MTP loss", f"{now.mtp_loss:.3f}", self.mtp_losses.values, "nats per token"))
        rows.append(self._held_out(width))
        rows.append(_row(width, "gradient", f"{now.grad_norm:.2f}", self.norms.values, "norm"))
        rows.append(_row(width, "rate", f"{now.learning_rate:.2e}", (), f"learning rate; {now.rows:,} rows a step"))
        peak = f", {now.peak_share:.0%} of the peak" if now.peak_share > 0 else ""
        rows.append(
            _row(width, "speed", f"{now.tokens_per_second:,.0f}", self.speeds.values, f"tokens/s{peak}", from_zero=True)
        )
        if now.max_vio:
            worst = max(now.max_vio)
            words = f"worst: layer {now.max_vio.index(worst) + 1} of {len(now.max_vio)}"
            rows.append(_row(width, "MaxVio", f"{worst:.2f}", now.max_vio, words, worst > EVEN, from_zero=True))
        return [*rows, *self._samples(width), self._save(width)]

    def _held_out(self, width: int) -> Text:
        if not self.looks:
            return _row(width, "held-out", "–", (), "bits per byte")
        now, before = self.looks[-1], [look for look in self.looks[:-1] if not look.whole]
        change = f", {now.bits_per_byte - before[-1].bits_per_byte:+.3f}".replace("-", "−") if before else ""
        reach = ", all of it" if now.whole else change
        values = [look.bits_per_byte for look in self.looks]
        return _row(width, "held-out", f"{now.bits_per_byte:.3f}", values, f"bits per byte{reach}")

    def _samples(self, width: int) -> list[Text]:
        """Acceptance of the drafts and the beginning of the text, of the last sample."""
        if not self.samples:
            return []
        now, rows = self.samples[-1], []
        if now.acceptance:
            more = "".join(f", {share:.0%}" for share in now.acceptance[1:])
            values = [sample.acceptance[0] for sample in self.samples]
            rows.append(_row(width, "drafts", f"{now.acceptance[0]:.0%}", values, f"accepted{more}"))
        return [*rows, Text.assemble(("writes".ljust(NAMES + 2), "cyan"), (" ".join(now.text.split()), "italic"))]

    def _save(self, width: int) -> Text:
        if math.isnan(self.saved):
            return _row(width, "saved", "–", (), "not yet")
        ago = duration(time.monotonic() - self.saved)
        return _row(width, "saved", ago, (), f"ago, at step {self.saved_step:,}")

    def _last(self, width: int) -> Text:
        """What is under way beside the steps, else what was last said."""
        if self.phase is None:
            return Text(" ".join(self.note.split()) or ("" if self.step else "preparing"), style="dim")
        share = self.phase.done / max(1, self.phase.total)
        return _bar(self.phase.name, share, amount(self.phase) + self.pace_note, width)


def _row(
    width: int,
    name: str,
    value: str,
    values: Sequence[float],
    words: str,
    warn: bool = False,
    from_zero: bool = False,
) -> Text:
    """A quantity: its name, its value now, how it came there, and what it is."""
    room = width - NAMES - VALUES - 4 - (WORDS if width >= SLIM else 0)
    known = [value for value in values if math.isfinite(value)]
    later = known[len(known) // 10 :]  # the first values tower over all others, and would flatten them
    low, high = (0.0 if from_zero else min(later), max(1.0, *later) if from_zero else max(later)) if later else (0, 1)
    picture = sparkline(known, min(WIDEST, max(room, 4)), low, high)
    words = words if width >= SLIM or not picture else ""
    gap = "  " if picture else ""
    style = "bold yellow" if warn else "bold"
    return Text.assemble(
        (name.ljust(NAMES), "cyan"), (value.rjust(VALUES), style), "  ", (picture, "blue"), gap, (words, "dim")
    )


def _bar(name: str, share: float, words: str, width: int) -> Text:
    """A name, a bar as long as there is room for, a share, and words."""
    room = width - len(name) - len(words) - 10
    full = round(min(max(share, 0.0), 1.0) * room)
    bar = (("━" * full, "green"), ("━" * (room - full), "bright_black")) if room >= 4 else ()
    return Text.assemble((name, "bold"), "  ", *bar, f" {share:4.0%}  ", words)
