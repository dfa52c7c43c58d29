"""Figures of a training run, of two runs side by side, and of what drafts are worth.

Letters: P steps (points of a curve), M MoE layers with the MTP modules' last, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cavelight.errors import UserError
from cavelight.see import style
from cavelight.see.architecture import draw_architecture
from cavelight.see.series import Floats, Series, moe_layer_names, smooth
from cavelight.see.style import AMBER, BLUE, DEEP_AMBER, FAINT, GREY, GROUND, INK, MUTED
from cavelight.spec.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_architecture", "draw_comparison", "draw_run", "draw_speculation"]

Metrics = Sequence[Mapping[str, Any]]

EVEN_ENOUGH = 0.5  # MaxVio under which a layer's load counts as balanced
NAMED_LAYERS = 8  # more lines than these are not named one by one


def draw_run(
    metrics: Metrics,
    path: Path,
    title: str,
    reference: Mapping[str, float] | None = None,
    config: ModelConfig | None = None,
) -> None:
    """One training run from the lines of its metrics.jsonl: losses, held-out bits per byte, balance of the experts.

    path: ends in .png, .svg or .pdf. reference: bits per byte to compare with, such as {"xz -9e": 1.79}. config names
    the layers; without it they are numbered. Raises UserError for a run without a step.
    """
    series = _series(metrics, title)
    names = moe_layer_names(config) if config else _numbered(series)
    with style.sheet(path, 9.0, 7.3) as figure:
        style.heading(figure, title, _facts(series))
        left, right, width = 0.6, 5.05, 2.95
        _losses(style.panel(figure, left, 1.05, width, 1.95), series)
        _held_out(style.panel(figure, right, 1.05, width, 1.95), {"": series}, reference or {})
        _layers(style.panel(figure, left, 3.8, width, 1.7), series, names)
        _load(style.panel(figure, right, 3.8, width, 1.7), series, names)
        _strip(style.panel(figure, left, 6.3, width, 0.5), series, series.learning_rate_P, "Learning rate")
        _strip(style.panel(figure, right, 6.3, width, 0.5), series, series.grad_norm_P, "Gradient norm")


def draw_comparison(
    runs: Mapping[str, Metrics],
    path: Path,
    title: str = "Balancing the experts' load",
    config: ModelConfig | None = None,
) -> None:
    """Runs that differ in one thing, first the one to judge: MaxVio, held-out bits per byte and load, side by side.

    runs: label to the lines of a metrics.jsonl, two to four. Raises UserError for a run without a step.
    """
    series = {label: _series(metrics, label) for label, metrics in runs.items()}
    first = next(iter(series.values()))
    names = moe_layer_names(config) if config else _numbered(first)
    with style.sheet(path, 9.0, 5.9) as figure:
        style.heading(figure, title, _facts(first)[:2])
        _violations(style.panel(figure, 0.6, 1.05, 3.05, 1.95), series)
        _held_out(style.panel(figure, 5.2, 1.05, 2.55, 1.95), series, {})
        place, width = 0.95, (7.6 - 0.3 * len(series)) / len(series)
        for i, (label, run) in enumerate(series.items()):
            axes = style.panel(figure, place + i * (width + 0.3), 3.85, width, 1.55)
            _load(axes, run, names, label, named=i == 0, scale=i == len(series) - 1)


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


def _series(metrics: Metrics, name: str) -> Series:
    series = Series.of(metrics)
    if not len(series.step_P):
        raise UserError("There is nothing to draw", got=name, why="its metrics hold no step", do="train it first")
    return series


def _facts(series: Series) -> list[str]:
    scales = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next((scale for scale in scales if series.seconds >= 2 * scale[0]), scales[-1])
    facts = [f"{series.step_P[-1]:,} steps", f"{style.short(series.tokens_P[-1])} tokens"]
    facts.append(f"{series.seconds / size:.1f} {unit}")
    if series.final:
        facts.append(f"{series.final[1]:.3f} bits per byte on all held-out text")
    return facts


def _numbered(series: Series) -> tuple[str, ...]:
    return tuple(f"MoE {m + 1}" for m in range(len(series.load_ME)))


def _curve(axes: "Axes", x_P: Any, y_P: Floats, color: str, faint: bool = True) -> Floats:
    """A smoothed line over its faint raw values; returns the smoothed values."""
    smooth_P = smooth(y_P)
    if faint:
        axes.plot(x_P, y_P, color=color, linewidth=0.5, alpha=0.28)
    axes.plot(x_P, smooth_P, color=color, marker="." if len(x_P) <= 20 else "", markersize=4)
    return smooth_P


def _losses(axes: "Axes", series: Series) -> None:
    style.entitle(axes, "Loss", "nats per token")
    parts = [("next token", BLUE, series.loss_P)]
    if series.has_mtp:
        parts.append(("MTP", AMBER, series.mtp_loss_P))
    ends = [(_last(_curve(axes, series.tokens_P, y_P, color)), name, color) for name, color, y_P in parts]
    _clip_start(axes, [y_P for _, _, y_P in parts])
    style.label_lines(axes, [(y, f"{name}  {y:.2f}", color) for y, name, color in ends])
    _along(axes, series.tokens_P, "tokens")


def _held_out(axes: "Axes", runs: Mapping[str, Series], reference: Mapping[str, float]) -> None:
    style.entitle(axes, "Held-out text", "bits per byte")
    if not any(run.looks or run.final for run in runs.values()):
        style.say_instead(axes, "not evaluated in this run")
        return
    labels = []
    for (name, run), color in zip(runs.items(), (BLUE, AMBER, GREY, INK), strict=False):
        looks = [(run.tokens_at(step), bits) for step, bits in run.looks]
        if looks:
            marker = "o" if len(looks) <= 25 else ""
            axes.plot(*zip(*looks, strict=True), color=color, marker=marker, markersize=3, clip_on=False, zorder=3)
        if run.final:
            at = run.tokens_at(run.final[0])
            axes.plot(at, run.final[1], "D", color=color, markersize=6, clip_on=False, zorder=4, markeredgecolor=GROUND)
        last = run.final or (run.looks[-1] if run.looks else None)
        if last:
            words = f"{name}  {last[1]:.2f}".strip() + ("" if name or not run.final else "  all text")
            labels.append((last[1], words, color))
    style.label_levels(axes, [(bits, f"{name}  {bits:.2f}") for name, bits in reference.items()], least=0.05)
    style.label_lines(axes, labels, size=8)
    _along(axes, max((run.tokens_P for run in runs.values()), key=lambda tokens_P: int(tokens_P[-1])), "tokens")


def _layers(axes: "Axes", series: Series, names: Sequence[str]) -> None:
    style.entitle(axes, "Busiest expert of each layer", "MaxVio: load over mean − 1")
    if not names:
        style.say_instead(axes, "no layer has experts")
        return
    is_mtp = [name.startswith("MTP") for name in names]
    blues = iter(style.shades(is_mtp.count(False)))
    labels, curves = [], []
    for m, (name, vio) in enumerate(zip(names, series.mean_max_vio_M(), strict=True)):
        color = AMBER if is_mtp[m] else next(blues)
        curves.append(_curve(axes, series.step_P, series.max_vio_PM[:, m], color, faint=len(names) <= 3))
        axes.lines[-1].set_linewidth(1.2 if len(names) <= NAMED_LAYERS else 0.6)
        if len(names) <= NAMED_LAYERS or m in (0, len(names) - 1) or is_mtp[m]:
            labels.append((vio, f"{name}  {vio:.2f}", color))
    _from_zero(axes, curves)
    style.label_lines(axes, labels, size=8)
    _along(axes, series.step_P, "steps")


def _violations(axes: "Axes", runs: Mapping[str, Series]) -> None:
    """Mean and worst layer of each run."""
    style.entitle(axes, "Busiest expert", "MaxVio, mean of the layers")
    labels, curves = [], []
    for (name, run), color in zip(runs.items(), (BLUE, AMBER, GREY, INK), strict=False):
        if not run.max_vio_PM.shape[1]:
            style.say_instead(axes, "no layer has experts")
            return
        mean_P, worst_P = smooth(run.max_vio_PM.mean(axis=1)), smooth(run.max_vio_PM.max(axis=1))
        for y_P, words, width in ((mean_P, name, 1.6), (worst_P, "its worst layer", 0.8)):
            axes.plot(run.step_P, y_P, color=color, linewidth=width)
            labels.append((_last(y_P), words, color))
            curves.append(y_P)
    _from_zero(axes, curves)
    style.label_lines(axes, labels, size=8)
    _along(axes, next(iter(runs.values())).step_P, "steps")


def _from_zero(axes: "Axes", curves: Sequence[Floats]) -> None:
    """Scale MaxVio by the later half, since it starts high anyhow, and draw the line at EVEN_ENOUGH."""
    half = len(curves[0]) // 2
    highest = max(float(np.nanmax(y_P, initial=0.0)) for y_P in curves)
    later = max(float(np.nanmax(y_P[half:], initial=0.0)) for y_P in curves)
    axes.set_ylim(0, max(min(highest, 1.5 * later), 2 * EVEN_ENOUGH) * 1.04)
    axes.axhline(EVEN_ENOUGH, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))


def _load(
    axes: "Axes",
    series: Series,
    names: Sequence[str],
    title: str = "Load of each expert",
    named: bool = True,
    scale: bool = True,
) -> None:
    """Layer by expert, relative to an even share; twice that and more has the darkest colour."""
    layers, experts = series.load_ME.shape
    used, present = int(series.used_M().sum()), layers * experts
    share = f"all {present:,} in use" if used == present else f"{used:,} of {present:,} in use"
    style.entitle(axes, title, f"last tenth; {share}", grid=None)
    if not layers:
        style.say_instead(axes, "no layer has experts")
        return
    gaps = 1.0 if experts <= 64 and layers <= 24 else 0.0
    image = axes.pcolormesh(series.load_ME, cmap=style.diverging(), vmin=0, vmax=2, edgecolors=GROUND, linewidth=gaps)
    image.set_rasterized(layers * experts > 2000)
    axes.invert_yaxis()
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    shown = range(0, layers, -(-layers // 12)) if named else ()
    axes.set_yticks([m + 0.5 for m in shown], [names[m] for m in shown])
    ends = [0, experts // 2, experts - 1] if experts > 2 else range(experts)
    axes.set_xticks([e + 0.5 for e in ends], [str(e) for e in ends])
    axes.set_xlabel("expert", fontsize=8)
    if scale:
        bar = axes.inset_axes((1.03, 0, 0.022, 1))
        axes.figure.colorbar(image, cax=bar, ticks=[0, 1, 2])
        bar.set_yticklabels(["idle", "even", "≥ 2×"], fontsize=8)
        bar.tick_params(length=0)
        bar.spines[:].set_visible(False)


def _strip(axes: "Axes", series: Series, y_P: Floats, title: str) -> None:
    """A low panel; single spikes may leave it."""
    style.entitle(axes, title)
    _curve(axes, series.step_P, y_P, MUTED)
    usual = y_P[np.isfinite(y_P)]
    axes.set_ylim(0, 1.15 * float(np.percentile(usual, 99)) if usual.any() else 1)
    axes.locator_params(axis="y", nbins=3)
    axes.yaxis.set_major_formatter(lambda value, _: style.short(value))
    _along(axes, series.step_P, "steps")


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


def _along(axes: "Axes", x_P: Any, word: str) -> None:
    axes.set_xlim(0, int(x_P[-1]))
    style.count_axis(axes.xaxis, word)


def _clip_start(axes: "Axes", curves: Sequence[Floats]) -> None:
    """Keep the first steps of a long run, which tower over all others, from flattening the rest."""
    start = len(curves[0]) // 50
    later = np.concatenate([y_P[start:] for y_P in curves])
    later = later[np.isfinite(later)]
    if len(later):
        low, high = float(later.min()), float(later.max())
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _last(y_P: Floats) -> float:
    """The last finite value; 0 where there is none."""
    known = y_P[np.isfinite(y_P)]
    return float(known[-1]) if len(known) else 0.0
