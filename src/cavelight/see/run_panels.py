"""The panels of a training run, each drawn on axes of its own: the report shows them singly, sheets put some together.

Letters: P steps (points of a curve), B spans of steps, M MoE layers with the MTP modules' last, E experts,
J prediction depths.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cavelight.see import style
from cavelight.see.series import Floats, Series, smooth, spans, thin
from cavelight.see.style import AMBER, BLUE, GREY, GROUND, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

EVEN_ENOUGH = 0.5  # MaxVio under which a layer's load counts as balanced
DENSE = 1500  # steps from which single ones would lie upon one another, and are drawn as a band
NAMED_LAYERS = 8  # more lines than these are not named one by one
RUNS = (BLUE, AMBER, GREY, INK)  # colours of runs side by side


def losses(axes: "Axes", series: Series) -> None:
    """Of the next token, and of each prediction depth."""
    style.entitle(axes, "Loss", "nats per token")
    curves = [("next token", BLUE, series.loss_P), *_depths(series)]
    ends = [(last(curve(axes, series.tokens_P, y_P, color)), name, color) for name, color, y_P in curves]
    _clip_start(axes, [y_P for _, _, y_P in curves])
    style.label_lines(axes, [(y, f"{name}  {y:.2f}", color) for y, name, color in ends], size=8)
    along(axes, series.tokens_P)


def mtp_excess(axes: "Axes", series: Series) -> None:
    """How much harder the tokens further ahead are than the next one."""
    style.entitle(axes, "MTP loss − main loss", "nats per token")
    ends, curves = [], []
    for name, color, y_P in _depths(series):
        smooth_P = smooth(y_P) - smooth(series.loss_P)
        axes.plot(series.tokens_P, smooth_P, color=color, marker="." if len(y_P) <= 20 else "", markersize=4)
        ends.append((last(smooth_P), f"{name}  {last(smooth_P):+.2f}".replace("-", "−"), color))
        curves.append(smooth_P)
    axes.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    _clip_start(axes, [*curves, np.zeros_like(series.loss_P)])
    style.label_lines(axes, ends, size=8)
    along(axes, series.tokens_P)


def _depths(series: Series) -> list[tuple[str, str, Floats]]:
    """Name, colour and loss of each prediction depth."""
    depths = series.mtp_losses_PJ.shape[1]
    colors = style.shades(depths, "amber")
    return [(f"MTP {j + 1}" if depths > 1 else "MTP", colors[j], series.mtp_losses_PJ[:, j]) for j in range(depths)]


def held_out(axes: "Axes", runs: Mapping[str, Series], reference: Mapping[str, float]) -> None:
    """One run or several, told apart by colour; reference: bits per byte of something else, as dashed lines."""
    style.entitle(axes, "Held-out text", "bits per byte")
    if not any(run.looks or run.final for run in runs.values()):
        style.say_instead(axes, "not evaluated in this run")
        return
    labels = []
    for (name, run), color in zip(runs.items(), RUNS, strict=False):
        looks = [(run.tokens_at(step), bits) for step, bits in run.looks]
        if looks:
            marker = "o" if len(looks) <= 25 else ""
            axes.plot(*zip(*looks, strict=True), color=color, marker=marker, markersize=3, clip_on=False, zorder=3)
        if run.final:
            at = run.tokens_at(run.final[0])
            axes.plot(at, run.final[1], "D", color=color, markersize=6, clip_on=False, zorder=4, markeredgecolor=GROUND)
        end = run.final or (run.looks[-1] if run.looks else None)
        if end:
            words = f"{name}  {end[1]:.2f}".strip() + ("" if name or not run.final else "  all text")
            labels.append((end[1], words, color))
    style.label_levels(axes, [(bits, f"{name}  {bits:.2f}") for name, bits in reference.items()], least=0.05)
    style.label_lines(axes, labels, size=8)
    along(axes, max((run.tokens_P for run in runs.values()), key=lambda tokens_P: int(tokens_P[-1])))


def violations(axes: "Axes", series: Series, names: Sequence[str]) -> None:
    """MaxVio of each layer."""
    style.entitle(axes, "Busiest expert", "MaxVio: load over mean − 1")
    if not names:
        style.say_instead(axes, "no layer has experts")
        return
    curves, labels = _layers(axes, series, names, series.max_vio_PM, series.mean_max_vio_M())
    from_zero(axes, curves)
    style.label_lines(axes, labels, size=8)
    along(axes, series.tokens_P)


def biases(axes: "Axes", series: Series, names: Sequence[str]) -> None:
    """How far apart the routing biases of each layer have drifted."""
    style.entitle(axes, "Routing bias", "largest − smallest of the layer")
    curves, labels = _layers(axes, series, names, series.bias_range_PM, series.bias_range_PM[-1])
    top = max(float(np.nanmax(y_P, initial=0.0)) for y_P in curves)
    axes.set_ylim(0, 1.06 * top or 1.0)
    style.label_lines(axes, labels, size=8)
    along(axes, series.tokens_P)


def _layers(
    axes: "Axes", series: Series, names: Sequence[str], y_PM: Floats, told_M: Floats
) -> tuple[list[Floats], list[tuple[float, str, str]]]:
    """A line for each layer, from light to dark, MTP's in amber; what was drawn, and labels with the told values."""
    is_mtp = [name.startswith("MTP") for name in names]
    blues, ambers = iter(style.shades(is_mtp.count(False))), iter(style.shades(is_mtp.count(True), "amber"))
    labels, curves = [], []
    for m, (name, value) in enumerate(zip(names, told_M, strict=True)):
        color = next(ambers if is_mtp[m] else blues)
        curves.append(curve(axes, series.tokens_P, y_PM[:, m], color, faint=len(names) <= 3))
        axes.lines[-1].set_linewidth(1.2 if len(names) <= NAMED_LAYERS else 0.6)
        if len(names) <= NAMED_LAYERS or m in (0, len(names) - 1) or is_mtp[m]:
            labels.append((float(value), f"{name}  {value:.2f}", color))
    return curves, labels


def from_zero(axes: "Axes", curves: Sequence[Floats]) -> None:
    """Scale MaxVio by the later half, since it starts high anyhow, and draw the line at EVEN_ENOUGH."""
    half = len(curves[0]) // 2
    highest = max(float(np.nanmax(y_P, initial=0.0)) for y_P in curves)
    later = max(float(np.nanmax(y_P[half:], initial=0.0)) for y_P in curves)
    axes.set_ylim(0, max(min(highest, 1.5 * later), 2 * EVEN_ENOUGH) * 1.04)
    axes.axhline(EVEN_ENOUGH, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))


def load(
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
    image = _heat(axes, series.load_ME, (0, experts), (layers, 0))
    if experts <= 64 and layers <= 24:  # lines between the cells
        axes.hlines(range(1, layers), 0, experts, color=GROUND, linewidth=1)
        axes.vlines(range(1, experts), 0, layers, color=GROUND, linewidth=1)
    shown = range(0, layers, -(-layers // 12)) if named else ()
    axes.set_yticks([m + 0.5 for m in shown], [names[m] for m in shown])
    _name_experts(axes, "x", experts)
    if scale:
        _scale(axes, image)


def load_over_time(axes: "Axes", series: Series, layer: int, name: str) -> None:
    """Each expert of one layer against tokens, in the colours of `load`."""
    experts = series.load_BME.shape[2]
    style.entitle(axes, f"Load, {name}", f"MaxVio {series.mean_max_vio_M()[layer]:.2f} at the end", grid=None)
    end = int(series.tokens_P[-1])
    image = _heat(axes, series.load_BME[:, layer].T, (0, end), (experts, 0))
    style.count_axis(axes.xaxis, "tokens")
    _name_experts(axes, "y", experts)
    _scale(axes, image)


def _heat(axes: "Axes", values: Floats, x: tuple[float, float], y: tuple[float, float]) -> "AxesImage":
    image = axes.imshow(
        values, cmap=style.diverging(), vmin=0, vmax=2, aspect="auto", interpolation="none", extent=(*x, *y)
    )
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    return image


def _name_experts(axes: "Axes", which: str, experts: int) -> None:
    ends = sorted({0, experts // 2, experts - 1})
    places = [e + 0.5 for e in ends]
    if which == "x":
        axes.set_xticks(places, [str(e) for e in ends])
        axes.set_xlabel("expert", fontsize=8)
    else:
        axes.set_yticks(places, [str(e) for e in ends])
        axes.set_ylabel("expert", fontsize=8, labelpad=2)


def _scale(axes: "Axes", image: "AxesImage") -> None:
    """What the colours mean, right of a panel."""
    bar = axes.inset_axes((1.03, 0, 0.022, 1))
    colors = axes.figure.colorbar(image, cax=bar, ticks=[0, 1, 2])
    if colors.solids is not None:
        colors.solids.set_rasterized(True)  # a picture, as the panel's, so that a page can treat both alike
    bar.set_yticklabels(["idle", "even", "≥ 2×"], fontsize=8)
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)


def strip(axes: "Axes", series: Series, y_P: Floats, title: str, unit: str = "") -> None:
    """A quantity over the run, from zero; single spikes may leave the panel."""
    style.entitle(axes, title, unit)
    curve(axes, series.tokens_P, y_P, MUTED)
    usual = y_P[np.isfinite(y_P)]
    axes.set_ylim(0, 1.15 * float(np.percentile(usual, 99)) if usual.any() else 1)
    axes.locator_params(axis="y", nbins=3 if _is_low(axes) else 5)
    axes.yaxis.set_major_formatter(lambda value, _: style.short(value))
    along(axes, series.tokens_P)


def _is_low(axes: "Axes") -> bool:
    return bool(axes.bbox.height / axes.figure.dpi < 1)


def gradient(axes: "Axes", series: Series, clip_norm: float | None, spikes: Sequence[int]) -> None:
    """Norm before clipping on a logarithmic scale, with the clip; steps that were left out or spiked are marked."""
    y_P = np.where(series.grad_norm_P > 0, series.grad_norm_P, np.nan)
    known = y_P[np.isfinite(y_P)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.1, 1.0)
    low, high = min(low, clip_norm or low) / 1.3, max(high, clip_norm or high) * 1.3
    spiked_P, skipped_P = np.isin(series.step_P, spikes), series.skipped_P
    words = [
        f"{sign} {word}" for sign, word, at in (("×", "left out", skipped_P), ("▼", "spike", spiked_P)) if at.any()
    ]
    style.entitle(axes, "Gradient norm", "   ".join(words) or "before clipping")
    axes.set(yscale="log", ylim=(low, high * (1.25 if words else 1.0)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: style.short(value))
    if high / low < 30:
        marks = [m * 10.0**n for n in range(-6, 9) for m in (1, 2, 5) if low <= m * 10.0**n <= high]
        axes.set_yticks(marks)
    curve(axes, series.tokens_P, y_P, BLUE)
    labels = [(last(smooth(y_P)), f"now  {last(smooth(y_P)):.2f}", BLUE)] if len(known) else []
    if clip_norm:
        axes.axhline(clip_norm, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        labels.append((clip_norm, f"clip  {clip_norm:g}", INK))
    for at_P, marker in ((skipped_P, "x"), (spiked_P, "v")):
        height = np.where(np.isfinite(y_P[at_P]), y_P[at_P], high)
        axes.plot(
            series.tokens_P[at_P], height, marker, color=style.DEEP_AMBER, markersize=4.5, zorder=4, clip_on=False
        )
    style.label_lines(axes, labels, size=8)
    along(axes, series.tokens_P)


def share(axes: "Axes", tokens: Any, curves: Sequence[tuple[str, Any]], title: str, unit: str, end: int) -> None:
    """Shares between 0 and 1 as percentages, named at their ends; few points are marked. end: tokens of the run."""
    style.entitle(axes, title, unit)
    colors = style.shades(len(curves), "amber")
    ends = []
    for (name, y), color in zip(curves, colors, strict=True):
        values = np.asarray(y, dtype=np.float64)
        if len(values) <= 40:
            axes.plot(tokens, values, color=color, marker="o", markersize=3, clip_on=False)
            reached = last(values)
        else:
            reached = last(curve(axes, tokens, values, color))
        ends.append((reached, f"{name}  {reached:.0%}".strip(), color))
    highest = max((float(np.nanmax(y, initial=0.0)) for _, y in curves), default=0.0)
    axes.set_ylim(0, min(1.0, max(1.15 * highest, 0.05)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.locator_params(axis="y", nbins=5)
    style.label_lines(axes, ends, size=8)
    axes.set_xlim(0, end)
    style.count_axis(axes.xaxis, "tokens")


def setting(axes: "Axes", series: Series, y_P: Floats, title: str, unit: str) -> None:
    """A quantity that is set, not measured: drawn as it is, from zero."""
    style.entitle(axes, title, unit)
    x_P, y = thin(series.tokens_P, y_P)
    axes.plot(x_P, y, color=BLUE, marker="." if len(y_P) <= 20 else "", markersize=4)
    axes.set_ylim(0, 1.12 * float(np.nanmax(y_P, initial=0.0)) or 1.0)
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: style.short(value))
    style.label_lines(axes, [(last(y_P), f"now  {style.short(last(y_P))}", BLUE)], size=8)
    along(axes, series.tokens_P)


def curve(axes: "Axes", x_P: Any, y_P: Floats, color: str, faint: bool = True) -> Floats:
    """A smoothed line over its faint raw values, which lie below all lines; returns the smoothed values."""
    smooth_P = smooth(y_P)
    if faint and len(y_P) > DENSE:
        x, low, high = spans(x_P, y_P, DENSE // 5)
        axes.fill_between(x, low, high, color=color, linewidth=0, alpha=0.22, zorder=1.5)
    elif faint:
        axes.plot(x_P, y_P, color=color, linewidth=0.5, alpha=0.28, zorder=1.5)
    axes.plot(*thin(x_P, smooth_P), color=color, marker="." if len(x_P) <= 20 else "", markersize=4)
    return smooth_P


def along(axes: "Axes", tokens_P: Any) -> None:
    """Tokens from 0 to the run's end, along the lower edge."""
    axes.set_xlim(0, int(tokens_P[-1]))
    style.count_axis(axes.xaxis, "tokens")


def _clip_start(axes: "Axes", curves: Sequence[Floats]) -> None:
    """Keep the first steps of a long run, which tower over all others, from flattening the rest."""
    start = len(curves[0]) // 50
    later = np.concatenate([y_P[start:] for y_P in curves])
    later = later[np.isfinite(later)]
    if len(later):
        low, high = float(later.min()), float(later.max())
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def last(y_P: Floats) -> float:
    """The last finite value; 0 where there is none."""
    known = y_P[np.isfinite(y_P)]
    return float(known[-1]) if len(known) else 0.0
