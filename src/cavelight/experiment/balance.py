"""(c) Balancing by bias against an auxiliary loss and none: loss and MaxVio."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cavelight.experiment import pictures
from cavelight.experiment.page import plus_minus, signed, verdict
from cavelight.experiment.study import Outcome, Run, Told, bits
from cavelight.see import style
from cavelight.see.series import Floats, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def max_vio(run: Run) -> float:
    """Mean over the layers and the last tenth of the steps."""
    return float(run.series.mean_max_vio_M().mean())


def lasting_vio(run: Run) -> float:
    """MaxVio of the loads of all the last tenth's steps together, in which what differs by chance cancels."""
    return float((run.series.load_ME.max(axis=1) - 1).mean())


def tell(outcome: Outcome) -> Told:
    bias, *others = outcome.study.variants
    less = f"less {bias.label}'s"
    head = ("balanced by", "bits per byte", less, "MaxVio of a step", less, "MaxVio of a tenth")
    rows, said = [], []
    for variant in outcome.study.variants:
        differences = [outcome.difference(variant.key, read) for read in (bits, max_vio)]
        told = ["", ""] if variant is bias else [signed(differences[0]), signed(differences[1], 2)]
        means = [plus_minus(outcome.of(variant.key, bits)), plus_minus(outcome.of(variant.key, max_vio), 2)]
        lasting = plus_minus(outcome.of(variant.key, lasting_vio), 2)
        rows.append((variant.label, means[0], told[0], means[1], told[1], lasting))
    for variant in others:
        this = "no balancing" if variant.key == "none" else variant.label
        said.append(verdict(outcome.difference(variant.key, bits), this, bias.label, "bits per byte"))
        violation = outcome.difference(variant.key, max_vio)
        said.append(verdict(violation, this, bias.label, "MaxVio", more="a higher", less="a lower", digits=2))
    return Told((head, *rows), said)


def draw(outcome: Outcome, path: Path) -> None:
    with style.sheet(path, 9.0, 3.6) as figure:
        style.heading(figure, outcome.study.title, [pictures.ERRORS])
        _violations(style.panel(figure, 0.6, 1.05, 3.0, 2.1), outcome)
        axes = style.panel(figure, 5.75, 1.05, 2.6, 2.1)
        style.entitle(axes, "Held-out text", "bits per byte")
        everything: list[float] = []
        most = 0.0
        for variant, color in zip(outcome.study.variants, pictures.COLORS, strict=False):
            x = outcome.of(variant.key, max_vio).mean
            pictures.mark(axes, x, outcome.values(variant.key, bits), outcome.of(variant.key, bits), color)
            everything, most = everything + outcome.values(variant.key, bits), max(most, x)
        pictures.room(axes, everything)
        axes.set_xlim(0, 1.15 * most)
        axes.set_xlabel("MaxVio, mean of layers, last tenth of the steps", fontsize=8)


def _violations(axes: "Axes", outcome: Outcome) -> None:
    """MaxVio along the runs: mean over layers and seeds, smoothed."""
    style.entitle(axes, "Busiest expert", "MaxVio, mean of layers and seeds")
    labels = []
    for variant, color in zip(outcome.study.variants, pictures.COLORS, strict=False):
        curves: list[Floats] = [smooth(run.series.max_vio_PM.mean(axis=1), 40) for run in outcome.runs[variant.key]]
        tokens_P = outcome.runs[variant.key][0].series.tokens_P
        for curve_P in curves:
            axes.plot(tokens_P, curve_P, color=color, linewidth=0.5, alpha=0.35)
        mean_P = np.mean(curves, axis=0)
        axes.plot(tokens_P, mean_P, color=color)
        labels.append((float(mean_P[-1]), variant.label, color))
    axes.set_xlim(0, int(tokens_P[-1]))
    axes.set_ylim(0, None)
    style.count_axis(axes.xaxis, "tokens")
    style.label_lines(axes, labels, size=8)
