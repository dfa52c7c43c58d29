"""Figures of a training run, of two runs side by side, and of what drafts are worth.

Letters: P steps (points of a curve), M MoE layers with the MTP modules' last, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cavelight.errors import UserError
from cavelight.see import run_panels as panels
from cavelight.see import style
from cavelight.see.architecture import draw_architecture
from cavelight.see.figure import number
from cavelight.see.run_log import RunLog
from cavelight.see.run_panels import EVEN_ENOUGH
from cavelight.see.series import Series, layer_names, smooth
from cavelight.see.style import AMBER, DEEP_AMBER, FAINT, GREY, INK
from cavelight.spec.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EVEN_ENOUGH", "draw_architecture", "draw_comparison", "draw_run", "draw_speculation"]

Metrics = Sequence[Mapping[str, Any]]


def draw_run(run: RunLog, path: Path, *more: Path) -> None:
    """One training run on one sheet: losses, held-out bits per byte, balance of the experts, schedule, gradient.

    Each path ends in .png, .svg or .pdf.
    """
    series, names = run.series, run.layers
    with style.sheet(path, 9.0, 7.3, *more) as figure:
        style.heading(figure, run.title, facts(series, run.steps))
        left, right, width = 0.6, 5.05, 2.95
        panels.losses(style.panel(figure, left, 1.05, width, 1.95), series)
        panels.held_out(style.panel(figure, right, 1.05, width, 1.95), {"": series}, run.reference)
        panels.violations(style.panel(figure, left, 3.8, width, 1.7), series, names)
        panels.load(style.panel(figure, right, 3.8, width, 1.7), series, names)
        panels.strip(style.panel(figure, left, 6.3, width, 0.5), series, series.learning_rate_P, "Learning rate")
        panels.strip(style.panel(figure, right, 6.3, width, 0.5), series, series.grad_norm_P, "Gradient norm")


def draw_comparison(
    runs: Mapping[str, Metrics],
    path: Path,
    title: str = "Balancing the experts' load",
    config: ModelConfig | None = None,
) -> None:
    """Runs that differ in one thing, first the one to judge: MaxVio, held-out bits per byte and load, side by side.

    runs: label to the lines of a metrics.jsonl, two to four. Raises UserError for a run without a step.
    """
    series = {label: read(metrics, label) for label, metrics in runs.items()}
    first = next(iter(series.values()))
    names = layer_names(first, config)
    with style.sheet(path, 9.0, 5.9) as figure:
        style.heading(figure, title, facts(first)[:2])
        _violations(style.panel(figure, 0.6, 1.05, 3.05, 1.95), series)
        panels.held_out(style.panel(figure, 5.2, 1.05, 2.55, 1.95), series, {})
        place, width = 0.95, (7.6 - 0.3 * len(series)) / len(series)
        for i, (label, run) in enumerate(series.items()):
            axes = style.panel(figure, place + i * (width + 0.3), 3.85, width, 1.55)
            panels.load(axes, run, names, label, named=i == 0, scale=i == len(series) - 1)


def draw_speculation(stats_with: Mapping[str, Any], stats_without: Mapping[str, Any], path: Path) -> None:
    """What the drafts of the MTP modules are worth: share accepted by position, and speed beside plain decoding.

    Both arguments are run.stats.Stats.as_dict() of the same prompts, decoded with drafts and without.
    """
    with style.sheet(path, 7.2, 2.75) as figure:
        facts = [f"{stats_with['new_tokens']:,} tokens"]
        if stats_with["rounds"]:
            facts.append(f"{stats_with['tokens_per_round']:.2f} of them a round")
            facts += ["drafting turned itself off"] if stats_with["off"] else []
        style.heading(figure, "Decoding with multi-token prediction", facts)
        _acceptance(style.panel(figure, 0.6, 1.05, 2.4, 1.3), stats_with)
        _speeds(style.panel(figure, 4.4, 1.05, 1.8, 1.3), stats_with, stats_without)


def read(metrics: Metrics, name: str) -> Series:
    """The run's series. Raises UserError if it has no step."""
    series = Series.of(metrics)
    if not len(series.step_P):
        raise UserError("There is nothing to draw", got=name, why="its metrics hold no step", do="train it first")
    return series


def facts(series: Series, planned: int = 0) -> list[str]:
    """How long the run was, and what it reached; planned: the steps that it is to have, if it may not be through."""
    scales = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next((scale for scale in scales if series.seconds >= 2 * scale[0]), scales[-1])
    done = int(series.step_P[-1])
    steps = f"{done:,} of {planned:,} steps" if done < planned and not series.final else number(done, "step")
    told = [steps, f"{style.short(series.tokens_P[-1])} tokens", f"{series.seconds / size:.1f} {unit}"]
    return told + ([f"{series.final[1]:.3f} bits per byte on all held-out text"] if series.final else [])


def _violations(axes: "Axes", runs: Mapping[str, Series]) -> None:
    """Mean and worst layer of each run."""
    style.entitle(axes, "Busiest expert", "MaxVio, mean of the layers")
    labels, curves = [], []
    for (name, run), color in zip(runs.items(), panels.RUNS, strict=False):
        if not run.max_vio_PM.shape[1]:
            style.say_instead(axes, "no layer has experts")
            return
        mean_P, worst_P = smooth(run.max_vio_PM.mean(axis=1)), smooth(run.max_vio_PM.max(axis=1))
        for y_P, words, width in ((mean_P, name, 1.6), (worst_P, "its worst layer", 0.8)):
            axes.plot(run.tokens_P, y_P, color=color, linewidth=width)
            labels.append((panels.last(y_P), words, color))
            curves.append(y_P)
    panels.from_zero(axes, curves)
    style.label_lines(axes, labels, size=8)
    panels.along(axes, next(iter(runs.values())).tokens_P)


def _acceptance(axes: "Axes", stats: Mapping[str, Any]) -> None:
    style.entitle(axes, "Drafts accepted", "of those proposed", grid=None)
    if not stats["rounds"]:
        style.say_instead(axes, stats["off"] or "no draft was made")
        return
    rates = [accepted / proposed for accepted, proposed in zip(stats["accepted"], stats["proposed"], strict=True)]
    places = range(1, len(rates) + 1)
    axes.bar(places, [1.0] * len(rates), width=0.62, color=FAINT)
    axes.bar(places, rates, width=0.62, color=AMBER)
    for place, rate in zip(places, rates, strict=True):
        axes.text(place, 1.03, f"{rate:.0%}", ha="center", va="bottom", color=DEEP_AMBER, weight="bold")
    middle, half = (1 + len(rates)) / 2, max(len(rates), 3) / 2 + 0.1
    axes.set(xlim=(middle - half, middle + half), ylim=(0, 1.25), yticks=[], xticks=places)
    axes.set_xticklabels([f"+{place}" for place in places])
    axes.set_xlabel("places ahead of the verified token", fontsize=8)
    axes.tick_params(length=0)


def _speeds(axes: "Axes", stats_with: Mapping[str, Any], stats_without: Mapping[str, Any]) -> None:
    style.entitle(axes, "Speed", "tokens per second", grid=None)
    plain, drafted = stats_without["tokens_per_second"], stats_with["tokens_per_second"]
    axes.barh([1, 0], [plain, drafted], height=0.55, color=[GREY, AMBER])
    ratio = f"   {drafted / plain:.2f}×" if plain else ""
    for place, speed, words in ((1, plain, ""), (0, drafted, ratio)):
        axes.annotate(
            f"{speed:.1f}{words}", (speed, place), xytext=(4, 0), textcoords="offset points", va="center", weight="bold"
        )
    axes.set(yticks=[0, 1], yticklabels=["with drafts", "without"], xticks=[], ylim=(-0.5, 1.5), xlim=(0, None))
    axes.tick_params(axis="y", labelsize=8.5, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)
