"""`look` at a run: its report, one page and the same figures as files, at any time of the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cavelight.disk import file_beside
from cavelight.see import style
from cavelight.see.draw import draw_run, facts
from cavelight.see.run_log import RunLog
from cavelight.see.run_page import run_page
from cavelight.see.run_parts import Drawing, Part, parts
from cavelight.spec.events import Event, Phase

PAGE = "index.html"
WIDTH, LEFT, TOP, BELOW = 3.8, 0.52, 0.36, 0.46  # inches of a panel's sheet, and around the panel on it


@dataclass(frozen=True)
class Report:
    """What was written: the page, and the parts that it has with what stands out in each."""

    page: Path
    facts: tuple[str, ...]
    parts: tuple[Part, ...]


def report(
    run: Path,
    metrics: Sequence[Mapping[str, Any]],
    out: Path | None = None,
    reference: Mapping[str, float] | None = None,
    title: str = "",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Report:
    """Write the report of the run in the folder `run` to `out` (unless told, RUN/report).

    metrics: the lines of its metrics.jsonl. reference: bits per byte to compare with, such as {"xz -9e": 1.79}. Files
    that stand there from an earlier look are replaced one by one, the page last. Raises UserError for a run without a
    step, and for full disks.
    """
    log = RunLog.of(run, metrics, reference, title)
    folder, shown = out or run / "report", parts(log)
    drawings = [drawing for part in shown for drawing in part.drawings]
    svgs = {}
    for count, drawing in enumerate(drawings):
        on_event(Phase("drawing", count, len(drawings), "figures"))
        svgs[drawing.key] = _draw(drawing, folder)
    draw_run(log, folder / "run.svg", folder / "run.png")
    told = facts(log.series, log.steps)
    inside = "../model-look/index.html" if out is None and (run / "model-look" / "index.html").is_file() else ""
    page = run_page(log, told, shown, svgs, inside)
    with file_beside(folder / PAGE) as scratch:
        scratch.write_text(page, encoding="utf-8")
    on_event(Phase("drawing", len(drawings), len(drawings), "figures"))
    return Report(folder / PAGE, tuple(told), shown)


def _draw(drawing: Drawing, folder: Path) -> str:
    """Write one panel as SVG and PNG; returns the SVG."""
    file = folder / f"{drawing.key}.svg"
    with style.sheet(file, WIDTH, TOP + drawing.height + BELOW, file.with_suffix(".png")) as figure:
        drawing.draw(style.panel(figure, LEFT, TOP, WIDTH - LEFT - drawing.room, drawing.height))
    return file.read_text(encoding="utf-8")
