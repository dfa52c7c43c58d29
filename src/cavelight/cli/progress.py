"""Screens for long work: live on a terminal, a plain line now and then elsewhere, JSON lines for machines."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict

from rich.live import Live

from cavelight.cli.live import Pace, Picture, amount
from cavelight.cli.screen import OUT, duration, say_json
from cavelight.spec.events import Evaluated, Event, Note, Phase, Sampled, Saved, Step

REDRAW = 0.5  # seconds between two drawings of the live screen, at least
LINE = 10.0  # seconds between two plain lines
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
    with Live(console=OUT, auto_refresh=False, transient=False, vertical_overflow="crop") as live:

        def listen(event: Event) -> None:
            nonlocal last
            picture.take(event)
            if isinstance(event, Note):  # stays above, as a record
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
            return f"{name}: {amount(event)}"
        case Evaluated(step, bits, whole):
            return f"step {step:,}  held-out {bits:.3f} bits per byte ({'all of it' if whole else 'a sample'})"
        case Sampled(step, _, text, acceptance):
            held = ", ".join(f"{share:.0%}" for share in acceptance)
            return f"step {step:,}  writes {text!r}" + (f", drafts accepted {held}" if held else "")
        case Step():
            parts = [f"step {event.step:,}/{event.steps:,}", f"loss {event.loss:.3f}"]
            parts += [f"MTP {event.mtp_loss:.3f}"] if event.mtp_loss else []
            parts += [f"{event.tokens_per_second:,.0f} tokens/s"]
            parts += [f"worst MaxVio {max(event.max_vio):.2f}"] if event.max_vio else []
            return "  ".join([*parts, f"{duration(event.seconds_left)} left"])
