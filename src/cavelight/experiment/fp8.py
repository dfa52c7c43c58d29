"""(e) fp8 and bf16 against float32: the relative error of the training loss, step by step.

Letters: P steps.
"""

from pathlib import Path

import numpy as np

from cavelight.experiment import pictures
from cavelight.experiment.page import capital, plus_minus, signed, verdict
from cavelight.experiment.statistics import estimate
from cavelight.experiment.study import Outcome, Run, Told, bits
from cavelight.see import style
from cavelight.see.series import Floats, last_tenth

KEPT = 0.9  # of the moving average, at each step
CLAIMED = 0.0025  # the report's bound
SETTLED = 0.2  # share of a run before which losses fall so fast that a step's delay looks like an error


def tell(outcome: Outcome) -> Told:
    exact, *others = outcome.study.variants
    head = ("", "bits per byte", "less float32's", "error of the loss at the end, %", "largest on the way, %")
    rows, said = [(exact.label, plus_minus(outcome.of(exact.key, bits)), "", "", "")], []
    for variant in others:
        errors = errors_of(outcome, variant.key)
        ends = estimate([100 * float(error_P[-last_tenth(len(error_P)) :].mean()) for error_P in errors])
        largest = [100 * float(np.abs(error_P[int(SETTLED * len(error_P)) :]).max()) for error_P in errors]
        told = (variant.label, plus_minus(outcome.of(variant.key, bits)), signed(outcome.difference(variant.key, bits)))
        rows.append((*told, signed(ends, 3), plus_minus(estimate(largest), 3)))
        stays = "stays" if max(largest) < 100 * CLAIMED else "does not stay"
        said.append(
            f"{capital(variant.label)}: after the first fifth of the steps the smoothed loss {stays} within "
            f"{100 * CLAIMED:g} % of float32's; the largest error is {max(largest):.2f} %."
        )
        said.append(verdict(outcome.difference(variant.key, bits), variant.label, exact.label, "bits per byte"))
    said.append(_against_bf16(outcome))
    return Told((head, *rows), said)


def _against_bf16(outcome: Outcome) -> str:
    """The report's own comparison."""
    errors = errors_of(outcome, "fp8", "bf16")
    ends = estimate([100 * float(error_P[-last_tenth(len(error_P)) :].mean()) for error_P in errors])
    largest = max(100 * float(np.abs(error_P[int(SETTLED * len(error_P)) :]).max()) for error_P in errors)
    return f"Fp8 against bf16: {signed(ends, 3)} % at the end; the largest error is {largest:.2f} %."


def draw(outcome: Outcome, path: Path) -> None:
    exact, *others = outcome.study.variants
    with style.sheet(path, 7.4, 3.5) as figure:
        style.heading(figure, outcome.study.title, ["training loss, moving average of 0.9; thin lines: seeds"])
        axes = style.panel(figure, 0.75, 1.05, 4.6, 2.0)
        style.entitle(axes, f"Relative loss error against {exact.label}", "%")
        labels, largest = [], 100 * CLAIMED
        for variant, color in zip(others, pictures.COLORS, strict=False):
            errors = [100 * error_P for error_P in errors_of(outcome, variant.key)]
            tokens_P = outcome.runs[variant.key][0].series.tokens_P
            for error_P in errors:
                axes.plot(tokens_P, error_P, color=color, linewidth=0.5, alpha=0.5)
                largest = max(largest, float(np.abs(error_P[int(SETTLED * len(error_P)) :]).max()))
            mean_P = np.mean(errors, axis=0)
            axes.plot(tokens_P, mean_P, color=color)
            labels.append((float(mean_P[-1]), variant.label, color))
        axes.axhspan(-100 * CLAIMED, 100 * CLAIMED, color=style.FAINT, alpha=0.6, linewidth=0, zorder=0)
        axes.axhline(0, color=style.INK, linewidth=0.6)
        axes.set_ylim(-1.15 * largest, 1.15 * largest)
        axes.annotate(
            "the report's 0.25 %",
            (0.015, 100 * CLAIMED),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            color=style.MUTED,
            size=7.5,
            va="top",
        )
        axes.set_xlim(0, int(tokens_P[-1]))
        style.count_axis(axes.xaxis, "tokens")
        style.label_lines(axes, labels, size=8)


def errors_of(outcome: Outcome, key: str, reference: str = "") -> list[Floats]:
    """(smoothed loss - the reference's) / the reference's at each step, [P], for each seed; by default the first's."""
    others = outcome.runs[reference or outcome.study.variants[0].key]
    pairs = zip(outcome.runs[key], others, strict=True)
    return [_average(run) / _average(other) - 1 for run, other in pairs]


def _average(run: Run) -> Floats:
    """The exponential moving average of the loss, free of its start's bias."""
    average, weight, averages = 0.0, 0.0, []
    for loss in run.series.loss_P:
        average, weight = KEPT * average + (1 - KEPT) * loss, KEPT * weight + (1 - KEPT)
        averages.append(average / weight)
    return np.array(averages)
