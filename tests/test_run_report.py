"""The report of a run: whole at any time of it, true to what was logged, self-contained, legible in light and dark."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Sheet
from matplotlib.text import Text
from tests.test_draw import SIX_LAYERS, check_places, metrics, shown
from typer.testing import CliRunner

from cavelight.cli.main import app
from cavelight.errors import UserError
from cavelight.see import run_panels as panels
from cavelight.see import run_report, style
from cavelight.see.run_log import RunLog
from cavelight.see.run_parts import MOST_MAPS, parts
from cavelight.see.run_report import Report, report
from cavelight.see.series import MOST_SPANS, Series, thin
from cavelight.spec.events import Event, Phase
from cavelight.spec.recipe import Recipe
from cavelight.train.sessions import note_session

NEW = ("rows", "mtp_losses", "bias_range", "skipped", "peak_share")  # that older logs do not have
TEXT = 'f(x):\n    return "<b>" & $x$'


def sampled(step: int, *acceptance: float) -> dict[str, Any]:
    return {"kind": "sampled", "step": step, "prompt": "def ", "text": TEXT, "acceptance": list(acceptance)}


def full() -> list[dict[str, Any]]:
    """A run with all that may happen: samples, a spike, a step left out, a NaN."""
    lines = metrics(steps=60)
    for line in lines:
        if line["kind"] == "step" and line["step"] in (20, 30):
            line["skipped"] = True
        if line["kind"] == "step" and line["step"] == 30:
            line["grad_norm"] = float("nan")
    spike = {"kind": "spike", "step": 20, "loss": 9.5, "back_to": None}
    return [*lines, spike, sampled(14, 0.25, 0.125), sampled(56, 0.75, 0.5)]


def young() -> list[dict[str, Any]]:
    return metrics(steps=1, looks=False, layers=2)


def old() -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in NEW} for line in metrics(layers=2)]


def dense() -> list[dict[str, Any]]:
    return [line | {"max_vio": [], "counts": [], "bias_range": []} for line in metrics(mtp=False)]


def not_finite() -> list[dict[str, Any]]:
    worst = dict.fromkeys(("loss", "mtp_loss", "grad_norm"), float("nan"))
    return [line | worst | {"mtp_losses": [float("nan")]} for line in metrics(layers=2)]


def watch(patch: pytest.MonkeyPatch) -> list[str]:
    """All words of the figures drawn from now on. On each none overlap or leave the sheet; pictures are left empty."""
    seen: list[str] = []
    save = Sheet.savefig

    def savefig(figure: Sheet, file: Path, **options: Any) -> None:
        if options["format"] == "png":  # the same figure once more
            file.write_bytes(b"")
            return
        save(figure, file, **options)
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and shown(text)]
        seen.extend(text.get_text() for text in texts)
        check_places(figure, texts)

    patch.setattr(Sheet, "savefig", savefig)
    return seen


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(run_report, "draw_run", lambda *arguments: None)  # test_draw looks at the sheet
    return watch(monkeypatch)


class Reader(HTMLParser):
    """Checks that tags close in order; gathers ids, where links lead, and what would be fetched."""

    VOID = frozenset({"meta", "br", "path", "use", "image"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids += [str(values["id"])] if "id" in values else []
        self.links += [str(values[key]) for key in ("href", "src", "srcset") if key in values]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(page: Path) -> tuple[str, Reader]:
    text, reader = page.read_text(encoding="utf-8"), Reader()
    reader.feed(text)
    assert reader.open == []
    return text, reader


def folder(path: Path, lines: list[dict[str, Any]], changes: tuple[str, ...] = ()) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe.read("demo", changes)
    (path / "recipe.json").write_text(recipe.model_dump_json())
    return path


@dataclass(frozen=True)
class Seen:
    """A report with all that there can be in it, and what was seen while it was made."""

    run: Path
    found: Report
    text: str
    page: Reader
    words: list[str]
    events: list[Event]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    run = folder(tmp_path_factory.mktemp("runs") / "a & b", full(), ("train.seed=7",))
    note_session(run / "sessions.jsonl", 0, "a machine", 2.5e11)
    note_session(run / "sessions.jsonl", 31, "another <machine>", 5e11)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps(SIX_LAYERS.to_hf()))
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        words = watch(patch)
        found = report(run, full(), reference={"xz": 1.75}, on_event=events.append)
    yield Seen(run, found, *read(found.page), words, events)


def test_the_report_holds_all_that_was_logged(seen: Seen) -> None:
    assert seen.found.page == seen.run / "report" / "index.html" and seen.found.facts[0] == "60 steps"
    for part in ("The run a &amp; b", "1.500 bits per byte", "xz takes 1.750", "2 updates left out; 1 spike of"):
        assert part in seen.text
    for part in ("return &quot;&lt;b&gt;&quot; &amp; $x$", "drafts accepted: 75%, 50%", "loss 9.5; back to –"):
        assert part in seen.text
    assert '<tr class="changed"><th scope="row">seed</th><td>7</td>' in seen.text
    assert "another &lt;machine&gt;" in seen.text and "went on 1 time" in seen.text and "0.500 Tflop/s" in seen.text
    for part in ("MTP  ", "layer 5", "× left out   ▼ spike", "clip  1", "xz  1.75", "MTP 1  75%", "MTP 2  50%"):
        assert [word for word in seen.words if part in word], part


def test_each_figure_lies_beside_the_page(seen: Seen) -> None:
    drawings = {drawing.key for part in seen.found.parts for drawing in part.drawings}
    names = {file.name for file in (seen.run / "report").iterdir()}
    assert names == {"index.html"} | {f"{key}.{suffix}" for key in {*drawings, "run"} for suffix in ("svg", "png")}
    assert {"loss", "held-out", "gradient-norm", "learning-rate", "batch", "speed", "peak", "max-vio"} <= drawings
    assert {"bias-range", "load", "load-layer-1", "load-MTP", "mtp-loss", "acceptance"} <= drawings
    phases = [event for event in seen.events if isinstance(event, Phase)]
    assert phases[0].done == 0 and phases[-1].done == phases[-1].total == len(drawings)


def test_the_page_needs_nothing_but_itself(seen: Seen) -> None:
    text, reader = seen.text, seen.page
    assert reader.scripts == 0 and "default-src 'none'" in text
    own = {f"#{name}" for name in reader.ids}
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link in own or link.startswith("data:image/png") for link in reader.links)
    assert set(re.findall(r"url\((#[^)]*)\)", text)) <= own
    assert text.count('role="img" aria-label="') == text.count("<svg ")


def test_every_colour_of_the_page_has_a_counterpart_in_the_dark(seen: Seen) -> None:
    used = set(re.findall(r"var\((--[\w-]+)\)", seen.text)) - {"--label", "--height"}
    schemes = [set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", seen.text, re.DOTALL)]
    assert used <= set.union(*schemes[0::2]) and used <= set.union(*schemes[1::2])
    drawings = "".join(re.findall(r"<svg .*?</svg>", seen.text, re.DOTALL))
    assert "fill: var(--" in drawings and not re.findall(r"(?:fill|stroke): #", drawings)


@pytest.mark.parametrize("lines", [young, old, dense, not_finite], ids=lambda lines: str(lines.__name__))
def test_every_kind_of_run_has_a_report(tmp_path: Path, words: list[str], lines: Any) -> None:
    run = folder(tmp_path / "run", lines())
    (run / "recipe.json").unlink()
    found = report(run, lines())
    read(found.page)
    titles = [part.title for part in found.parts]
    assert titles[0] == "Loss"
    assert ("Balance of the experts" in titles) == (lines is not dense) == ("Multi-token prediction" in titles)
    assert ("Recipe" in found.page.read_text()) is False


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    lines = [line | {"steps": 80} if line["kind"] == "step" else line for line in metrics()[:-1]]
    monkeypatch.setattr(run_report, "parts", lambda run: parts(run)[:1])
    found = report(folder(tmp_path / "run", lines), lines)
    assert found.facts[0] == "40 of 80 steps" and "sample of held-out text" in found.parts[0].finding


def test_findings_are_what_was_logged() -> None:
    lines = metrics(steps=100, layers=3, experts=4, mtp=False)
    for line in lines:
        if line["kind"] == "step":
            late = line["step"] > 90
            line |= {"max_vio": [0.1, 0.7 if late else 0.0, 0.2], "grad_norm": 2.0 if line["step"] <= 25 else 0.5}
            line["counts"] = [[5, 5, 5, 5], [0, 0, 10, 10] if line["step"] <= 50 else [20, 0, 0, 0], [1, 1, 1, 1]]
    run = RunLog("r", Series.of(lines), recipe={"train": {"clip_norm": 1.0}})
    findings = {part.key: part.finding for part in parts(run)}
    assert "median of 0.50; 25% of the steps were clipped at 1; no update was left out" in findings["optimisation"]
    assert "busiest expert of MoE 2 has 1.70 times its share" in findings["balance"]
    assert "MaxVio is above 0.5 in MoE 2;" in findings["balance"] and "3 experts without a token" in findings["balance"]
    assert "4.0 times its share, in MoE 2, 51% into the run" in findings["load-over-time"]
    assert "prediction" not in findings


def test_many_layers_are_not_all_mapped() -> None:
    run = RunLog("r", Series.of(metrics(steps=3, layers=40, experts=4)))
    maps = next(part for part in parts(run) if part.key == "load-over-time")
    keys = [drawing.key for drawing in maps.drawings]
    assert len(set(keys)) == MOST_MAPS and keys[0] == "load-MoE-1" and keys[-1] == "load-MoE-40"
    assert f"{MOST_MAPS} of 40 layers" in maps.how


def test_load_over_time_adds_up() -> None:
    lines = metrics(steps=300, layers=2, experts=4)
    series = Series.of(lines)
    assert series.load_BME.shape == (MOST_SPANS, 2, 4) and series.span_tokens_B[-1] == series.tokens_P[-1]
    np.testing.assert_allclose(series.load_BME.mean(axis=2), 1)
    first = np.sum([line["counts"] for line in lines if line["kind"] == "step" and line["step"] <= 2], axis=0)
    np.testing.assert_allclose(series.load_BME[0], first / first.mean(axis=1, keepdims=True))


def test_a_long_curve_is_thinned_to_its_extremes() -> None:
    x, y = np.arange(10_000), np.random.default_rng(0).normal(size=10_000)
    y[7_777], y[5] = 50, np.nan
    thin_x, thin_y = thin(x, y, most=100)
    assert len(thin_x) == len(thin_y) <= 100
    assert np.nanmax(thin_y) == 50 and np.nanmin(thin_y) == np.nanmin(y) and np.all(np.diff(thin_x) >= 0)
    assert thin(x[:100], y[:100], most=100)[1] is not None and len(thin(x[:100], y[:100], most=100)[1]) == 100


def test_single_steps_of_a_long_run_do_not_hide_its_curve() -> None:
    steps = np.arange(100_000)
    for count, bands in ((panels.DENSE, 0), (len(steps), 1)):
        axes = Sheet().add_subplot()
        panels.curve(axes, steps[:count], np.sin(steps[:count] * 1.0), style.BLUE)
        raw = [*axes.collections, *axes.lines[:-1]]
        assert len(axes.collections) == bands and len(raw) == 1 and raw[0].get_zorder() < axes.lines[-1].get_zorder()


def test_the_trend_is_of_whole_tenths() -> None:
    lines = [line for line in metrics(steps=100) if line["kind"] == "step"]
    for line in lines:
        line["loss"] = 2.0 if line["step"] <= 90 else 1.9
    assert "−0.10 from the last tenth but one to the last" in parts(RunLog("a", Series.of(lines)))[0].finding
    lines[-1]["loss"] += 0.9  # one step is no trend
    assert "−0.01 from the last tenth" in parts(RunLog("a", Series.of(lines)))[0].finding


def test_the_command_tells_what_stands_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(run_report, "parts", lambda run: parts(run)[:1])  # all are seen above
    run = folder(tmp_path / "run", metrics())
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"kind": "step", "st')  # a line that is being written
    shown = CliRunner().invoke(app, ["look", str(run)])
    assert shown.exit_code == 0, shown.output
    assert "The loss went from" in shown.output and str(Path("run") / "report" / "index.html") in shown.output
    told = CliRunner().invoke(app, ["look", str(run), "--out", str(tmp_path / "elsewhere"), "--json"])
    result = json.loads(told.output.splitlines()[-1])
    assert result["page"] == str(tmp_path / "elsewhere" / "index.html") and result["parts"][0]["title"] == "Loss"
    pages = [(place / "index.html").read_text() for place in (run / "report", tmp_path / "elsewhere")]
    assert pages[0] == pages[1]


def test_a_run_without_a_step_is_a_mistake(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [])
    with pytest.raises(UserError, match="no step yet"):
        report(run, [])
    assert CliRunner().invoke(app, ["look", str(run)]).exit_code == 2
