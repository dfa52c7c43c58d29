"""What the figures of experiments share: means with error bars over the single seeds, named where they stand."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cavelight.experiment.statistics import Estimate
from cavelight.see import style
from cavelight.see.style import AMBER, BLUE, GREY, GROUND, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (AMBER, BLUE, GREY, INK, "#5b9bd0", "#8a4300", "#66727e", "#0a2c4d")  # the first variant's is amber
ERRORS = "bars: standard error; small dots: seeds"


def mark(axes: "Axes", x: float, values: Sequence[float], found: Estimate, color: str) -> None:
    """A mean with its standard error, and the single seeds as faint dots."""
    axes.plot([x] * len(values), values, "o", color=color, markersize=2.5, alpha=0.45, zorder=2)
    error = found.error if math.isfinite(found.error) else 0.0
    axes.errorbar(
        [x],
        [found.mean],
        yerr=[error],
        fmt="o",
        color=color,
        markersize=6,
        capsize=3,
        elinewidth=1.1,
        markeredgecolor=GROUND,
        zorder=3,
    )


def name(axes: "Axes", x: float, y: float, text: str, color: str, below: bool = False) -> None:
    """Words beside a mark."""
    axes.annotate(
        text,
        (x, y),
        xytext=(0, -11) if below else (8, 5),
        textcoords="offset points",
        color=style.DEEP.get(color, color),
        size=8.5,
        ha="center" if below else "left",
        va="top" if below else "bottom",
    )


def columns(
    axes: "Axes",
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    found: Sequence[Estimate],
    colors: Sequence[str],
) -> None:
    """A mark for each label, side by side, with room around them."""
    for x, (seeds, mean, color) in enumerate(zip(values, found, colors, strict=True)):
        mark(axes, x, seeds, mean, color)
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    room(axes, [value for seeds in values for value in seeds])


def room(axes: "Axes", values: Sequence[float], least: float = 0.01) -> None:
    """Limits of the value axis: all seeds, with some room, and never a span so small that noise looks large."""
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max(0.62 * (high - low), least / 2)
    axes.set_ylim(middle - half, middle + half)
