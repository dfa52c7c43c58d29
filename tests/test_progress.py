"""Screens for long work: JSON lines, plain lines, and the live picture, which stays calm on any terminal."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.control import Control

from cavelight.cli import live, progress
from cavelight.cli.live import History, Picture
from cavelight.cli.progress import screen, sentence_of
from cavelight.cli.screen import duration, sparkline
from cavelight.spec.events import Evaluated, Event, Note, Phase, Sampled, Saved, Step

PLAIN = Step(
    step=1,
    steps=10,
    tokens=100,
    rows=8,
    loss=2.0,
    mtp_loss=0.0,
    mtp_losses=(),
    balance_loss=0.0,
    grad_norm=0.4,
    learning_rate=1e-3,
    tokens_per_second=1234.0,
    seconds_left=60.0,
    peak_share=0.0,
    max_vio=(),
    bias_range=(),
)


def step(number: int, of: int = 10, loss: float = 2.0) -> Step:
    now = replace(PLAIN, step=number, steps=of, loss=loss, mtp_loss=2.5, mtp_losses=(2.4, 2.6), balance_loss=1.0)
    return replace(now, peak_share=0.31, max_vio=(0.1, 0.7, 0.2), bias_range=(0.0, 0.0, 0.0))


EVENTS: tuple[Event, ...] = (
    Phase("tokenising", 0, 7, "files"),
    Phase("tokenising", 7, 7, "files"),
    Note("three files"),
    step(1),
    step(2),
    Evaluated(2, 1.5, False),
    Sampled(2, "def ", "f(x):\n    return x", (0.75, 0.5)),
    step(10),
    Saved(Path("runs/x"), "finished"),
)


def test_events_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with screen("a run", as_json=True) as listen:
        for event in EVENTS:
            listen(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.pop("kind") for line in lines] == [type(event).__name__.lower() for event in EVENTS]
    assert lines[3] == json.loads(json.dumps(asdict(step(1))))
    assert lines[-1] == {"path": "runs/x", "why": "finished"}


def test_json_lines_hold_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with screen("a run", as_json=True) as listen:
        listen(step(1, loss=float("nan")))
    assert json.loads(capsys.readouterr().out)["loss"] is None


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with screen("a run", as_json=False) as listen:
        for event in EVENTS:
            listen(event)
    assert capsys.readouterr().out.splitlines() == [
        "a run",
        "tokenising: 0 of 7 files",
        "tokenising: 7 of 7 files",
        "three files",
        "step 2  held-out 1.500 bits per byte (a sample)",
        "step 2  writes 'f(x):\\n    return x', drafts accepted 75%, 50%",
        "step 10/10  loss 2.000  MTP 2.500  1,234 tokens/s  worst MaxVio 0.70  1 min 00 s left",
        "saved runs/x (finished)",
    ]


def test_sentences_leave_out_what_a_model_does_not_have() -> None:
    assert sentence_of(PLAIN) == "step 1/10  loss 2.000  1,234 tokens/s  1 min 00 s left"
    assert sentence_of(Sampled(3, "a", "b", ())) == "step 3  writes 'b'"


class Terminal:
    """A console that counts what is drawn on it, of any width."""

    def __init__(self, width: int) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=width, height=40, highlight=False)

    def lines(self, picture: Picture) -> list[str]:
        plain = io.StringIO()  # a file has no colours
        Console(file=plain, width=self.console.width).print(picture.draw())
        return plain.getvalue().splitlines()


@pytest.fixture(params=[24, 46, 80, 120])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal(request.param)
    for module in (live, progress):
        monkeypatch.setattr(module, "OUT", terminal.console)
    yield terminal


def test_the_live_picture_fits_and_keeps_its_height(terminal: Terminal) -> None:
    picture, heights = (
        Picture("training a model with a name that is long into a folder of which that is true as well"),
        [],
    )
    for event in EVENTS[:3]:
        picture.take(event)
        assert len(terminal.lines(picture)) == 3
    for number in range(1, 200):
        picture.take(step(number, 200, loss=8 / number**0.5))
        picture.take(Note(f"step {number}: a sentence about it that is much longer than any terminal is wide " * 3))
        if number % 50 == 0:
            picture.take(Phase("evaluating", 3, 7, "documents"))
            heights.append(len(terminal.lines(picture)))
            picture.take(Evaluated(number, 2.0, False))
            picture.take(Saved(Path("x"), "regular save"))
        lines = terminal.lines(picture)
        heights.append(len(lines))
        assert {cell_len(line) for line in lines} == {terminal.console.width}
    assert len(set(heights)) == 1


def test_the_live_picture_shows_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80)
    monkeypatch.setattr(live, "OUT", terminal.console)
    picture = Picture("a run")
    for event in (*EVENTS, Evaluated(10, 1.25, True)):
        picture.take(event)
    rows = {line[2:11].strip(): line[11:-2].strip() for line in terminal.lines(picture)[3:-1]}
    assert terminal.lines(picture)[1].split("━")[0] == "│ step 10 of 10  "
    assert "100%" in terminal.lines(picture)[1] and "1 min 00 s left" in terminal.lines(picture)[1]
    assert rows["loss"].startswith("2.000") and rows["MTP loss"].startswith("2.500")
    assert rows["held-out"].startswith("1.250") and rows["held-out"].endswith("bits per byte, all of it")
    assert rows["gradient"].startswith("0.40")
    assert rows["rate"] == "1.00e-03  learning rate; 8 rows a step"
    assert rows["speed"].startswith("1,234") and rows["speed"].endswith("tokens/s, 31% of the peak")
    assert rows["MaxVio"] == "0.70  ▁▆▂  worst: layer 2 of 3"
    assert rows["drafts"].startswith("75%") and rows["drafts"].endswith("accepted, 50%")
    assert rows["writes"] == "f(x): return x"
    assert rows["saved"].endswith("ago, at step 10")


def test_the_live_picture_leaves_out_what_a_model_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80)
    monkeypatch.setattr(live, "OUT", terminal.console)
    picture = Picture("a run")
    picture.take(replace(PLAIN, loss=float("nan"), grad_norm=float("inf")))
    together = "\n".join(terminal.lines(picture))
    assert "loss           nan" in together and "not yet" in together
    assert not [word for word in ("MTP", "MaxVio", "of the peak", "drafts", "writes") if word in together]


def test_what_is_said_of_a_held_out_sample_is_how_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(100)
    monkeypatch.setattr(live, "OUT", terminal.console)
    picture = Picture("a run")
    for event in (step(1), Evaluated(1, 2.0, False), step(2), Evaluated(2, 1.75, False)):
        picture.take(event)
    assert "bits per byte, −0.250" in "\n".join(terminal.lines(picture))


def test_it_is_drawn_seldom_and_at_the_end(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    drawn: list[Step | None] = []
    draw = Picture.draw

    def count(picture: Picture) -> RenderableType:
        drawn.append(picture.step)
        return draw(picture)

    monkeypatch.setattr(Picture, "draw", count)
    with screen("a run", as_json=False) as listen:
        for number in range(1, 1001):
            now += 0.01
            listen(step(number, 1000))
    assert len(drawn) <= 10 / progress.REDRAW + 2
    assert drawn[-1] == step(1000, 1000)
    assert Control.show_cursor(True).segment.text in terminal.file.getvalue()


def test_a_note_stays_above_the_picture(terminal: Terminal) -> None:
    with screen("a run", as_json=False) as listen:
        listen(step(1))
        listen(Note("step 1: its update was left out"))
        listen(Saved(Path("runs/x"), "regular save"))
    shown = terminal.file.getvalue()
    assert "left out" in shown and "regular save" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (7380, "2 h 03 min"), (1e999, "–")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 1, 5, 5], 2) == "▁█"
    assert sparkline([2, float("nan")], 5) == "▁"
    assert sparkline([], 5) == ""


def test_a_history_of_any_length_stays_small_and_even() -> None:
    history = History(most=8)
    for value in range(1000):
        history.add(value)
    assert len(history.values) <= 8
    gaps = {b - a for a, b in zip(history.values, history.values[1:], strict=False)}
    assert gaps == {history.stride}
