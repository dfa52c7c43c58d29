"""The parts of a run's report: which panels belong together, how they are read, and what stands out in this run.

Letters: P steps (points of a curve), M MoE layers with the MTP modules' last, J prediction depths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cavelight.see import run_panels as panels
from cavelight.see.figure import listed, number
from cavelight.see.run_log import RunLog
from cavelight.see.run_panels import EVEN_ENOUGH
from cavelight.see.series import Floats, last_tenth, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 1.55  # inches of a panel
LABELS, SCALE, BARE = 1.05, 0.68, 0.18  # inches right of one: for words at lines, for a scale of colours, for nothing
MOST_MAPS = 16  # layers whose load over time is drawn; of more, these are chosen
LONG = 50  # steps from which one can speak of a trend


@dataclass(frozen=True)
class Drawing:
    """One panel. key: the name of its files. words: what it shows, for those who do not see it."""

    key: str
    words: str
    draw: "Callable[[Axes], None]"
    room: float = LABELS  # inches right of the panel
    height: float = HEIGHT


@dataclass(frozen=True)
class Part:
    """Panels under one title. `how` says how they are read, `finding` what stands out."""

    key: str
    title: str
    finding: str
    how: str
    drawings: tuple[Drawing, ...]


def parts(run: RunLog) -> tuple[Part, ...]:
    """All that this run has something to show of."""
    makers = (_loss, _optimisation, _speed, _balance, _load, _prediction)
    return tuple(part for maker in makers if (part := maker(run)) is not None)


def _loss(run: RunLog) -> Part:
    series = run.series
    smooth_P = smooth(series.loss_P)
    first = f"The loss went from {series.loss_P[0]:.2f} to {panels.last(smooth_P):.2f} nats per token"
    if len(smooth_P) >= LONG:
        tenth = last_tenth(len(smooth_P))
        change = float(np.nanmean(series.loss_P[-tenth:]) - np.nanmean(series.loss_P[-2 * tenth : -tenth]))
        first += (
            f", {change:+.2f} from the last tenth but one to the last".replace("-", "−") if abs(change) >= 0.005 else ""
        )
    sentences = [first]
    if series.final:
        sentences.append(f"held-out text costs {series.final[1]:.3f} bits per byte, all of it read")
    elif series.looks:
        step, bits = series.looks[-1]
        sentences.append(f"a sample of held-out text costs {bits:.3f} bits per byte after step {step:,}")
    sentences += [f"{name} takes {bits:.3f}" for name, bits in run.reference.items()]
    drawings = [Drawing("loss", "losses against tokens", partial(panels.losses, series=series))]
    if series.looks or series.final:
        draw = partial(panels.held_out, runs={"": series}, reference=run.reference)
        drawings.append(Drawing("held-out", "held-out bits per byte against tokens", draw))
    how = (
        "Faint are single steps (of a long run, the span between the least and the greatest of neighbours), strong the "
        "mean over a sixtieth of the run. Of held-out text, dots are "
        "looks at always the same sample, and the diamond is a look at all of it."
    )
    return Part("losses", "Loss", _join(sentences), how, tuple(drawings))


def _optimisation(run: RunLog) -> Part:
    series, clip = run.series, run.of_recipe("train", "clip_norm")
    known = series.grad_norm_P[np.isfinite(series.grad_norm_P)]
    sentences = [f"the gradient's norm has a median of {np.median(known):.2f}"] if len(known) else []
    if clip and len(known):
        sentences.append(f"{np.mean(known > clip):.0%} of the steps were clipped at {clip:g}")
    left_out = int(series.skipped_P.sum())
    sentences.append(f"{number(left_out, 'update')} left out" if left_out else "no update was left out")
    sentences += [number(len(run.spikes), "spike") + " of the loss"] if run.spikes else []
    gradient = partial(panels.gradient, series=series, clip_norm=clip, spikes=run.spikes)
    drawings = [
        Drawing("gradient-norm", "gradient norm against tokens", gradient),
        _chosen(run, "learning-rate", series.learning_rate_P, "Learning rate", ""),
    ]
    if np.isfinite(series.rows_P).any():
        row_length = run.of_recipe("data", "row_length")
        unit = f"rows of {row_length:,} tokens a step" if row_length else "rows a step"
        drawings.append(_chosen(run, "batch", series.rows_P, "Batch", unit))
    how = "The norm is the whole gradient's, on a logarithmic scale; the dashed line is where it is clipped."
    return Part("optimisation", "Gradient and schedule", _join(sentences), how, tuple(drawings))


def _chosen(run: RunLog, key: str, y_P: Floats, title: str, unit: str) -> Drawing:
    draw = partial(panels.setting, series=run.series, y_P=y_P, title=title, unit=unit)
    return Drawing(key, f"{title.lower()} against tokens", draw)


def _speed(run: RunLog) -> Part | None:
    series = run.series
    if not np.isfinite(series.tokens_per_second_P).any():
        return None
    sentences = [f"a median of {np.nanmedian(series.tokens_per_second_P):,.0f} tokens per second"]
    speed = partial(panels.strip, series=series, y_P=series.tokens_per_second_P, title="Speed", unit="tokens/s")
    drawings = [Drawing("speed", "tokens per second against tokens", speed, BARE)]
    peak_P = np.where(series.peak_share_P > 0, series.peak_share_P, np.nan)
    if np.isfinite(peak_P).any():
        sentences.append(f"{np.nanmedian(peak_P):.0%} of what this machine's matrix products reach alone")
        share = partial(
            panels.share,
            tokens=series.tokens_P,
            curves=[("", peak_P)],
            title="Share of the peak",
            unit="measured matmul peak",
            end=int(series.tokens_P[-1]),
        )
        drawings.append(Drawing("peak", "share of the measured matmul peak against tokens", share))
    how = (
        "Speed is averaged over a few steps. The share counts the operations of the model itself, of forward and "
        "backward pass, and nothing that is computed twice."
    )
    return Part("speed", "Speed", _join(sentences), how, tuple(drawings))


def _balance(run: RunLog) -> Part | None:
    series, names = run.series, run.layers
    if not names:
        return None
    vio_M = series.mean_max_vio_M()
    worst = int(np.nanargmax(vio_M)) if np.isfinite(vio_M).any() else 0
    above = [name for name, vio in zip(names, vio_M, strict=True) if vio > EVEN_ENOUGH]
    sentences = [
        f"at the end the busiest expert of {names[worst]} has {1 + vio_M[worst]:.2f} times its share of the tokens",
        _above(above, len(names)),
    ]
    draw = partial(panels.violations, series=series, names=names)
    drawings = [Drawing("max-vio", "MaxVio of each layer against tokens", draw)]
    if series.bias_range_PM.shape[1] == len(names):
        range_M = series.bias_range_PM[-1]
        sentences.append(f"routing biases lie up to {np.nanmax(range_M, initial=0.0):.3g} apart within a layer")
        draw = partial(panels.biases, series=series, names=names)
        drawings.append(Drawing("bias-range", "range of routing biases of each layer against tokens", draw))
    if series.load_ME.size:
        unused = series.load_ME.size - int(series.used_M().sum())
        sentences.append(f"{number(unused, 'expert')} without a token" if unused else "every expert is in use")
        draw = partial(panels.load, series=series, names=names)
        drawings.append(Drawing("load", "load of each expert at the end", draw, SCALE))
    how = (
        "MaxVio of a step is the largest load of a layer's experts over their mean, less 1; at the dashed line the "
        "busiest one has half as much again as its share. Lines of layers go in shades of blue from the first to the "
        "last; amber is MTP."
    )
    return Part("balance", "Balance of the experts", _join(sentences), how, tuple(drawings))


def _above(names: Sequence[str], layers: int) -> str:
    if not names:
        return f"MaxVio is at or below {EVEN_ENOUGH} in every layer"
    which = listed(names) if len(names) <= 4 else f"{len(names)} of {layers} layers"
    return f"MaxVio is above {EVEN_ENOUGH} in {which}"


def _load(run: RunLog) -> Part | None:
    series, names = run.series, run.layers
    if not series.load_BME.size:
        return None
    shown = list(range(len(names)))
    if len(names) > MOST_MAPS:
        shown = [round(m) for m in np.linspace(0, len(names) - 1, MOST_MAPS)]
    height = float(np.clip(0.1 * series.load_BME.shape[2], 0.8, HEIGHT))
    drawings = tuple(
        Drawing(
            f"load-{names[m].replace(' ', '-')}",
            f"load of each expert of {names[m]} against tokens",
            partial(panels.load_over_time, series=series, layer=m, name=names[m]),
            SCALE,
            height,
        )
        for m in shown
    )
    most_BM = series.load_BME.max(axis=2)
    b, m = np.unravel_index(int(np.argmax(most_BM)), most_BM.shape)
    at = series.span_tokens_B[b] / series.tokens_P[-1]
    when = f"{at:.0%} into the run" if at >= 0.02 else "as the run began"
    finding = f"At most an expert had {most_BM[b, m]:.1f} times its share, in {names[m]}, {when}."
    how = "A row is an expert, the run goes from left to right. Grey is an even share, blue less, amber more."
    if len(names) > MOST_MAPS:
        how += f" {MOST_MAPS} of {len(names)} layers are drawn."
    return Part("load-over-time", "Load of each expert over time", finding, how, drawings)


def _prediction(run: RunLog) -> Part | None:
    series = run.series
    if not series.has_mtp:
        return None
    excess_J = [panels.last(smooth(y_P) - smooth(series.loss_P)) for y_P in series.mtp_losses_PJ.T]
    above = listed([f"{excess:+.2f}".replace("-", "−") for excess in excess_J])
    sentences = [f"at the end the MTP loss is {above} nats against the next token's"]
    drawings = [Drawing("mtp-loss", "MTP losses less the main loss", partial(panels.mtp_excess, series=series))]
    drafted = [line for line in run.samples if line.get("acceptance")]
    if drafted:
        depths = min(len(line["acceptance"]) for line in drafted)
        names = [f"MTP {j + 1}" for j in range(depths)] if depths > 1 else ["MTP"]
        curves = [(name, [line["acceptance"][j] for line in drafted]) for j, name in enumerate(names)]
        shares = listed([f"{y[-1]:.0%}" for _, y in curves])
        sentences.append(f"{shares} of the drafts of the last sample held")
        draw = partial(
            panels.share,
            tokens=[series.tokens_at(line["step"]) for line in drafted],
            curves=curves,
            title="Drafts accepted",
            unit="of those proposed",
            end=int(series.tokens_P[-1]),
        )
        drawings.append(Drawing("acceptance", "share of drafts accepted against tokens", draw))
    how = (
        "A module's loss is about a token further ahead, but it is told the true tokens between; its sum is divided by "
        "the number of next tokens, of which a row and a document have one more. So it may lie above the main model's "
        "or a little below. A draft is accepted where the main model would have written the same."
    )
    return Part("prediction", "Multi-token prediction", _join(sentences), how, tuple(drawings))


def _join(sentences: Sequence[str]) -> str:
    """One sentence of several parts, with a capital."""
    whole = "; ".join(sentences) + "."
    return whole[0].upper() + whole[1:]
