"""The figure of a benchmark: what a token costs, by depth and by company, over what the machine's bandwidth allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cavelight.bench.sweep import Row
from cavelight.see import style
from cavelight.see.style import AMBER, BLUE, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, LEFT, GAP, TOP = 3.1, 2.2, 0.6, 1.6, 1.1  # inches


@dataclass(frozen=True)
class Panel:
    """Rows by what they differ in."""

    name: str
    axis: str
    rows: Sequence[tuple[int, Row]]


def draw_bench(rows: Sequence[Row], path: Path, title: str, facts: Sequence[str]) -> None:
    """By depth, and by company at the least depth."""
    steps = [row for row in rows if row.ours.case.kind == "decoding"]
    alone = sorted((row for row in steps if row.ours.case.batch == 1), key=lambda row: row.ours.case.depth)
    company = sorted(
        (row for row in steps if alone and row.ours.case.depth == alone[0].ours.case.depth),
        key=lambda row: row.ours.case.batch,
    )
    panels = [
        Panel("A token by depth", "positions in the cache", [(row.ours.case.depth, row) for row in alone]),
        Panel("A token by company", "sequences at once", [(row.ours.case.batch, row) for row in company]),
    ]
    draw_panels(panels, path, title, facts)


def draw_panels(panels: Sequence[Panel], path: Path, title: str, facts: Sequence[str]) -> None:
    """Milliseconds a token: measured, and what reading its bytes takes at the probe's bandwidth."""
    with style.sheet(path, LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 0.6) as figure:
        style.heading(figure, title, facts)
        for place, panel in enumerate(panels):
            axes = style.panel(figure, LEFT + place * (WIDTH + GAP), TOP, WIDTH, HEIGHT)
            style.entitle(axes, panel.name, "ms")
            if len(panel.rows) < 2:
                style.say_instead(axes, "Fewer than two were measured.")
                continue
            _lines(axes, [x for x, _ in panel.rows], [row for _, row in panel.rows], panel.axis)


def _lines(axes: "Axes", xs: Sequence[int], rows: Sequence[Row], label: str) -> None:
    from matplotlib.ticker import LogLocator

    least = [1e3 * row.ours.read / row.probes.read / row.ours.case.batch for row in rows]
    taken = [1e3 / row.ours.tokens_per_second for row in rows]
    peers = [(x, 1e3 / row.theirs.tokens_per_second) for x, row in zip(xs, rows, strict=True) if row.theirs]
    lines = [("bandwidth alone", xs, least, GREY), ("measured", xs, taken, BLUE)]
    if len(peers) > 1:
        lines.append(("transformers", [x for x, _ in peers], [y for _, y in peers], AMBER))
    for _, x, y, color in lines:
        axes.plot(x, y, "o-", color=color, markersize=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: style.short(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlim(0, max(xs) * 1.02)
    style.count_axis(axes.xaxis, label)
    style.label_lines(axes, [(y[-1], name, color) for name, _, y, color in lines])
