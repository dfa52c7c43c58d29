"""Screens for a training run: live on a terminal, a plain line now and then elsewhere, JSON lines for machines."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cavelight.cli.screen import OUT, duration, say_json, sparkline
from cavelight.spec.events import Evaluated, Event, Note, Phase, Saved, Step

REDRAW = 0.25  # seconds between two drawings of the live screen
LINE = 10.0  # seconds between two plain lines
EVEN = 0.5  # a MaxVio above this is shown as a warning
Listener = Callable[[Event], None]


def screen(title: str, as_json: bool) -> AbstractContextManager[Listener]:
    """A listener for the events of one run, in the form that suits where stdout goes."""
    if as_json:
        return _json_lines()
    return _live(title) if OUT.is_terminal else _plain_lines(title)


@contextmanager
def _json_lines() -> Iterator[Listener]:
    last = 0.0

    def listen(event: Event) -> None:
        nonlocal last
        if isinstance(event, Phase) and event.done < event.total:
            if time.monotonic() - last < 1:
                return
            last = time.monotonic()
        say_json({"kind": type(event).__name__.lower(), **asdict(event)})

    yield listen


@contextmanager
def _plain_lines(title: str) -> Iterator[Listener]:
    last, pace = 0.0, Pace()

    def listen(event: Event) -> None:
        nonlocal last
        note = pace.note(event) if isinstance(event, Phase) else ""
        if isinstance(event, Step | Phase):
            finished = event.step == event.steps if isinstance(event, Step) else event.done == event.total
            if not finished and time.monotonic() - last < LINE:
                return
            last = time.monotonic()
        OUT.print(sentence_of(event) + note, soft_wrap=True)

    OUT.print(title)
    yield listen


@contextmanager
def _live(title: str) -> Iterator[Listener]:
    picture, last = Picture(title), 0.0
    with Live(console=OUT, auto_refresh=False, transient=False) as live:

        def listen(event: Event) -> None:
            nonlocal last
            picture.take(event)
            if isinstance(event, Note | Saved):
                live.console.print(sentence_of(event), soft_wrap=True)
            if not isinstance(event, Step | Phase) or time.monotonic() - last >= REDRAW:
                last = time.monotonic()
                live.update(picture.draw(), refresh=True)

        try:
            yield listen
        finally:
            live.update(picture.draw(), refresh=True)


def sentence_of(event: Event) -> str:
    """An event as one plain line."""
    match event:
        case Note(text):
            return text
        case Saved(path, why):
            return f"saved {path} ({why})"
        case Phase(name):
            return f"{name}: {_amount(event)}"
        case Evaluated(step, bits, whole):
            return f"step {step:,}  held-out {bits:.3f} bits per byte ({'all of it' if whole else 'a sample'})"
        case Step():
            parts = [f"step {event.step:,}/{event.steps:,}", f"loss {event.loss:.3f}"]
            parts += [f"MTP {event.mtp_loss:.3f}"] if event.mtp_loss else []
            parts += [f"{event.tokens_per_second:,.0f} tokens/s"]
            parts += [f"worst MaxVio {max(event.max_vio):.2f}"] if event.max_vio else []
            return "  ".join([*parts, f"{duration(event.seconds_left)} left"])


def _amount(phase: Phase) -> str:
    if phase.unit == "B":
        size, unit = (1e9, "GB") if phase.total >= 1e10 else (1e6, "MB")
        return f"{phase.done / size:.1f} of {phase.total / size:.1f} {unit}"
    return f"{phase.done:,} of {phase.total:,} {phase.unit}"


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


@dataclass
class History:
    """A curve of any length in little memory: beyond `most` points it keeps every second one, then every fourth …"""

    most: int = 1024
    values: list[float] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, value: float) -> None:
        if self.seen % self.stride == 0:
            self.values.append(value)
        self.seen += 1
        if len(self.values) > self.most:
            self.values, self.stride = self.values[::2], self.stride * 2


class Picture:
    """The live screen: what was heard so far, drawn as one panel."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.step: Step | None = None
        self.looks: list[Evaluated] = []
        self.phase: Phase | None = None
        self.losses, self.mtp_losses = History(), History()
        self.began, self.pace, self.note = time.monotonic(), Pace(), ""

    def take(self, event: Event) -> None:
        match event:
            case Step():
                if self.step is None:
                    self.began = time.monotonic()
                self.step, self.phase = event, None
                self.losses.add(event.loss)
                self.mtp_losses.add(event.mtp_loss)
            case Evaluated():
                self.looks.append(event)
                self.phase = None
            case Phase():
                self.phase, self.note = event, self.pace.note(event)

    def draw(self) -> RenderableType:
        rows: list[RenderableType] = []
        if self.step:
            rows += [self._clock(self.step), Text(), self._figures(self.step)]
        if self.phase:
            rows.append(self._progress(self.phase))
        return Panel(Group(*rows or ["preparing"]), title=self.title, title_align="left", border_style="cyan")

    def _progress(self, phase: Phase) -> RenderableType:
        return _bar(phase.name, phase.done / max(1, phase.total), _amount(phase) + self.note)

    def _clock(self, now: Step) -> RenderableType:
        gone = time.monotonic() - self.began
        share = now.step / now.steps if now.steps else 0.0
        return _bar(
            f"step {now.step:,} of {now.steps:,}", share, f"{duration(gone)} gone, {duration(now.seconds_left)} left"
        )

    def _figures(self, now: Step) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        width = max(10, min(48, OUT.width - 50))
        table.add_row("loss", f"{now.loss:.3f}", sparkline(self.losses.values, width))
        if now.mtp_loss:
            table.add_row("MTP loss", f"{now.mtp_loss:.3f}", sparkline(self.mtp_losses.values, width))
        if self.looks:
            look = self.looks[-1]
            reach = "all of it" if look.whole else "a sample"
            past = sparkline([look.bits_per_byte for look in self.looks], width)
            table.add_row(
                "held-out", f"{look.bits_per_byte:.3f}", f"{past} bits per byte ({reach}, step {look.step:,})"
            )
        table.add_row("speed", f"{now.tokens_per_second:,.0f}", f"tokens/s, {now.tokens:,} tokens so far")
        table.add_row("rate", f"{now.learning_rate:.2e}", f"learning rate, gradient norm {now.grad_norm:.2f}")
        if now.max_vio:
            worst = max(now.max_vio)
            style = "yellow" if worst > EVEN else "green"
            bars = sparkline(now.max_vio, len(now.max_vio), low=0.0, high=max(1.0, worst))
            each = " ".join(f"{vio:.2f}" for vio in now.max_vio[:8]) + (" …" if len(now.max_vio) > 8 else "")
            table.add_row("MaxVio", Text(f"{worst:.2f}", style=style), f"{bars} worst of the layers {each}")
        return table


def _bar(name: str, share: float, note: str) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(name, style="bold"), ProgressBar(total=1.0, completed=share, width=30), f"{share:4.0%}", note)
    return table
