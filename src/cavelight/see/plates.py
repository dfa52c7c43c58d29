"""Figures as pictures in a file: the panels of one figure under each other, on one sheet in the look of all sheets."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill, wrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cavelight.see import style
from cavelight.see.figure import Curves, Dots, Figure, Heat, Line, Table, along, chosen, limits, short, ticks
from cavelight.see.style import AMBER, BLUE, GREY, GROUND, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LEFT, PLOT = 9.0, 1.45, 5.5  # inches: the sheet, where plots begin, how wide they are
LETTERS = 125  # in a line of words across the sheet
COLORS = {"blue": BLUE, "amber": AMBER, "grey": GREY, "ink": INK}
Drawn = Heat | Curves | Dots


def is_drawn(figure: Figure) -> bool:
    """Whether there is anything in it but tables."""
    return bool(_panels(figure))


def draw_figure(figure: Figure, path: Path) -> None:
    """One figure with its finding; tables are left to the page. path: ends in .png, .svg or .pdf."""
    words = wrap(figure.finding, LETTERS)
    panels = _panels(figure)
    heights = [_height(panel) for panel in panels]
    top = 0.72 + 0.17 * len(words)
    with style.sheet(path, WIDTH, top + sum(height + 1.0 for height in heights)) as sheet:
        style.heading(sheet, figure.title, left=0.35)
        tall = sheet.get_size_inches()[1]
        sheet.text(0.35 / WIDTH, 1 - 0.46 / tall, "\n".join(words), va="top", color=MUTED, linespacing=1.35)
        for panel, height in zip(panels, heights, strict=True):
            axes = style.panel(sheet, LEFT, top + 0.45, PLOT, height)
            style.entitle(axes, panel.title, panel.unit, grid=None)
            if isinstance(panel, Heat):
                _heat(axes, panel)
            elif isinstance(panel, Curves):
                _curves(axes, panel)
            else:
                _dots(axes, panel)
            top += height + 1.0


def _panels(figure: Figure) -> list[Drawn]:
    return [panel for panel in figure.panels if not isinstance(panel, Table)]


def _height(panel: Drawn) -> float:
    if isinstance(panel, Curves):
        return 1.7
    rows = len(panel.rows)
    return max(0.24 * rows, 0.4) if isinstance(panel, Dots) or rows <= 12 else max(2.9, 0.065 * rows)


def _heat(axes: "Axes", heat: Heat) -> None:
    rows, columns = heat.values.shape
    image = axes.imshow(heat.shades, cmap=style.diverging(), vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    for cells, marker, word in ((heat.marks, "o", heat.mark_word), (heat.crosses, "x", "not finite")):
        if cells is not None and cells.any():
            y, x = np.nonzero(cells)
            size = float(np.clip(600 / columns, 1, 9))
            edge: dict[str, Any] = {"edgecolors": GROUND} if marker == "o" else {}
            axes.scatter(x, y, s=size, c=INK, marker=marker, linewidths=0.6, label=word, **edge)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, ncols=2, handletextpad=0.2)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    shown = chosen(heat.rows, round(_height(heat) / 0.17))
    axes.set_yticks(shown, [heat.rows[r] for r in shown])
    _name_places(axes, heat.columns, np.arange(columns), heat.across)
    bar = axes.inset_axes((1.03, 0, 0.02, 1))
    axes.figure.colorbar(image, cax=bar, ticks=[-1, 0, 1])
    bar.set_yticklabels(heat.ends, fontsize=8)
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)


def _curves(axes: "Axes", curves: Curves) -> None:
    places = np.arange(len(curves.places)) if curves.dots else along(curves.places)
    _axis(axes, "y", curves.lines, curves.levels, curves.log)
    axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
    for line in curves.lines:
        marker = "o" if curves.dots and len(places) <= 40 else ""
        axes.plot(
            places, line.values, marker=marker, markersize=3, color=COLORS[line.color], **_look(line), clip_on=False
        )
    for value, _ in curves.levels:
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    _name_lines(axes, curves.lines, [word for _, word in curves.levels])
    across = curves.across or ("layer" if curves.places[0].startswith("layer") else "")
    _name_places(axes, curves.places, places, across)


def _dots(axes: "Axes", dots: Dots) -> None:
    rows = np.arange(len(dots.rows))
    _axis(axes, "x", dots.lines, dots.levels, dots.log)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.hlines(rows, 0, 1, transform=axes.get_yaxis_transform(), color=style.FAINT, linewidth=0.6)
    for line in dots.lines:
        look = {**_look(line), "linestyle": ""}
        axes.plot(line.values, rows, marker="o", markersize=5.5, color=COLORS[line.color], clip_on=False, **look)
    _name_lines(axes, dots.lines, [])
    axes.set_yticks(rows, dots.rows)


def _look(line: Line) -> dict[str, Any]:
    dashes = (0, (3, 2)) if line.dashed else "-"
    return {"alpha": 0.2 + 0.8 * line.strength, "linestyle": dashes, "label": line.name if line.named else "_"}


def _name_lines(axes: "Axes", lines: Sequence[Line], levels: Sequence[str]) -> None:
    """A legend right of the panel, level lines last."""
    handles, labels = axes.get_legend_handles_labels()
    handles += [axes.lines[-1]] * len(levels)
    labels = [fill(label, 22) for label in [*labels, *levels]]
    legend = axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.04), frameon=False, fontsize=8, handlelength=1.8
    )
    legend.set_in_layout(False)


def _axis(
    axes: "Axes", which: Literal["x", "y"], lines: Sequence[Line], levels: Sequence[tuple[float, str]], log: bool
) -> None:
    low, high = limits(lines, levels, log)
    axis = axes.yaxis if which == "y" else axes.xaxis
    axes.set(**{f"{which}scale": "log" if log else "linear", f"{which}lim": (low, high)})
    axis.set_ticks(marks := ticks(low, high, log), [short(mark) for mark in marks])
    axis.set_ticks([], minor=True)
    axes.grid(axis=which, color=style.FAINT, linewidth=0.6)


def _name_places(axes: "Axes", names: Sequence[str], places: np.ndarray, word: str) -> None:
    """Names below a panel, as many as there is room for; where they are layers, their numbers."""
    shown = chosen(names, 16)
    axes.set_xticks(places[shown], [names[i].removeprefix("layer ") for i in shown])
    axes.set_xlabel(word, fontsize=8)
