"""A run's metrics.jsonl as arrays. Pure numbers: what the figures draw and what the tables say comes from here.

Letters: P steps (points of a curve), B spans of steps, M MoE layers with the MTP modules' last, E experts,
J prediction depths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cavelight.spec.config import ModelConfig

Floats = NDArray[np.float64]

MOST_POINTS = 60  # a smoothed curve averages over a window of steps / MOST_POINTS
MOST_SPANS = 120  # of steps, into which a run is parted to show its experts' load over time


@dataclass(frozen=True)
class Series:
    """What a run logged, step by step; what was not finite or not logged is NaN. Looks at held-out text stand apart.

    load_BME is how often each expert was chosen in a span of steps, relative to an even share (1.0); span b ends after
    span_tokens_B[b] tokens. load_ME is the same for the last tenth of the steps.
    """

    step_P: NDArray[np.int64]
    tokens_P: NDArray[np.int64]
    seconds_P: Floats  # spent in the loop, over all sessions
    loss_P: Floats
    mtp_loss_P: Floats
    mtp_losses_PJ: Floats
    grad_norm_P: Floats
    skipped_P: NDArray[np.bool_]  # the gradient was not finite, or the step was left out as a spike
    learning_rate_P: Floats
    rows_P: Floats
    tokens_per_second_P: Floats
    peak_share_P: Floats
    max_vio_PM: Floats
    bias_range_PM: Floats
    load_ME: Floats
    load_BME: Floats
    span_tokens_B: NDArray[np.int64]
    looks: tuple[tuple[int, float], ...]  # (step, held-out bits per byte), each at the same small sample
    final: tuple[int, float] | None  # the same over all held-out text, where the run got so far

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, Any]]) -> Self:
        """From the lines of a metrics.jsonl, as train.state.read_metrics returns them."""
        steps = [line for line in metrics if line["kind"] == "step"]
        looks = [line for line in metrics if line["kind"] == "evaluated"]
        whole = [(line["step"], line["bits_per_byte"]) for line in looks if line["whole"]]
        mtp_losses_PJ = _table(steps, "mtp_losses")
        mtp_loss_P = _column(steps, "mtp_loss")
        if not mtp_losses_PJ.size and np.any(mtp_loss_P != 0):  # an older log: the mean over the depths
            mtp_losses_PJ = mtp_loss_P[:, None]
        grad_norm_P = _column(steps, "grad_norm")
        load_BME, span_tokens_B = _load_over_time(steps)
        return cls(
            step_P=np.array([line["step"] for line in steps], dtype=np.int64),
            tokens_P=np.array([line["tokens"] for line in steps], dtype=np.int64),
            seconds_P=_column(steps, "seconds"),
            loss_P=_column(steps, "loss"),
            mtp_loss_P=mtp_loss_P,
            mtp_losses_PJ=mtp_losses_PJ,
            grad_norm_P=grad_norm_P,
            skipped_P=~np.isfinite(grad_norm_P) | np.array([bool(line.get("skipped")) for line in steps], dtype=bool),
            learning_rate_P=_column(steps, "learning_rate"),
            rows_P=_column(steps, "rows"),
            tokens_per_second_P=_column(steps, "tokens_per_second"),
            peak_share_P=_column(steps, "peak_share"),
            max_vio_PM=_table(steps, "max_vio"),
            bias_range_PM=_table(steps, "bias_range"),
            load_ME=_load([line.get("counts") for line in steps[-last_tenth(len(steps)) :]]),
            load_BME=load_BME,
            span_tokens_B=span_tokens_B,
            looks=tuple((line["step"], line["bits_per_byte"]) for line in looks if not line["whole"]),
            final=whole[-1] if whole else None,
        )

    @property
    def seconds(self) -> float:
        """Spent in the loop until the last step."""
        return float(self.seconds_P[-1]) if len(self.seconds_P) else 0.0

    @property
    def has_mtp(self) -> bool:
        return bool(self.mtp_losses_PJ.size)

    def mean_max_vio_M(self) -> Floats:
        """Each layer's MaxVio, averaged over the last tenth of the steps."""
        return np.asarray(self.max_vio_PM[-last_tenth(len(self.step_P)) :].mean(axis=0))

    def used_M(self) -> NDArray[np.int64]:
        """How many of each layer's experts were chosen at least once in the last tenth of the steps."""
        return np.asarray((self.load_ME > 0).sum(axis=1))

    def tokens_at(self, step: int) -> int:
        """Tokens seen after `step` steps; 0 before the first that was logged."""
        logged = int(np.searchsorted(self.step_P, step, side="right"))
        return int(self.tokens_P[logged - 1]) if logged else 0


def last_tenth(steps: int) -> int:
    """The number of steps in a run's last tenth, one at least."""
    return max(1, round(steps / 10))


def smooth(values_P: Floats, most_points: int = MOST_POINTS) -> Floats:
    """A moving average over 1 / most_points of the curve; NaN is passed over.

    The window is centred, and where the curve begins it is narrower, so that a steep start keeps its height. At the
    end it only loses its later half: what one reads there is a mean and no single step.
    """
    half = len(values_P) // most_points // 2
    known_P = np.isfinite(values_P)
    total = np.concatenate([[0.0], np.cumsum(np.where(known_P, values_P, 0.0))])
    count = np.concatenate([[0], np.cumsum(known_P)])
    place = np.arange(len(values_P))
    reach = np.minimum(half, place)
    low, high = place - reach, np.minimum(place + reach + 1, len(values_P))
    known = count[high] - count[low]
    return np.where(known > 0, (total[high] - total[low]) / np.maximum(known, 1), np.nan)


def moe_layer_names(config: ModelConfig) -> tuple[str, ...]:
    """What to call the layers whose counts a step logs, in that order: the trunk's by number, then the MTP modules."""
    trunk = [f"layer {n}" for n in range(config.num_hidden_layers) if config.is_moe(n)]
    modules = config.num_nextn_predict_layers
    numbers = [n for n in range(modules) if config.is_moe(config.num_hidden_layers + n)]
    return (*trunk, *(f"MTP {n + 1}" if modules > 1 else "MTP" for n in numbers))


def layer_names(series: Series, config: ModelConfig | None) -> tuple[str, ...]:
    """Names of the layers that were logged; numbers where the configuration is not known, or another run's."""
    count = series.max_vio_PM.shape[1]
    names = moe_layer_names(config) if config else ()
    return names if len(names) == count else tuple(f"MoE {m + 1}" for m in range(count))


def thin(x_P: Any, y_P: Floats, most: int = 2000) -> tuple[Any, Floats]:
    """A curve of at most `most` points that looks the same: of each stretch of a longer one its least and greatest."""
    if len(y_P) <= most:
        return x_P, y_P
    x, low, high = spans(x_P, y_P, most // 2)
    return np.repeat(x, 2), np.stack([low, high], axis=1).ravel()


def spans(x_P: Any, y_P: Floats, count: int) -> tuple[Any, Floats, Floats]:
    """A curve in so many stretches: where each begins, its least and its greatest value."""
    edges = np.linspace(0, len(y_P), count + 1).astype(int)[:-1]
    return np.asarray(x_P)[edges], np.fmin.reduceat(y_P, edges), np.fmax.reduceat(y_P, edges)


def _column(steps: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return _finite([line.get(key) for line in steps])


def _table(steps: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """A row of values for each step, [P, ...]; no columns where the log does not have them, or not at every step."""
    rows = [line.get(key) or () for line in steps]
    width = min(map(len, rows), default=0)
    return _finite([row[:width] for row in rows]).reshape(len(steps), width)


def _finite(values: Sequence[Any]) -> Floats:
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    return np.where(np.isfinite(array), array, np.nan)


def _load_over_time(steps: Sequence[Mapping[str, Any]]) -> tuple[Floats, NDArray[np.int64]]:
    """The load in spans of equally many steps, [B, M, E], and how many tokens the run had met when each ended."""
    edges = np.linspace(0, len(steps), min(len(steps), MOST_SPANS) + 1).astype(int)
    spans = [_load([line.get("counts") for line in steps[first:end]]) for first, end in pairwise(edges)]
    ends = np.array([steps[end - 1]["tokens"] for end in edges[1:]], dtype=np.int64)
    return (np.stack(spans) if spans else np.zeros((0, 0, 0))), ends


def _load(counts: Sequence[Any]) -> Floats:
    """Counts of some steps, [steps][M][E], as each expert's share of an even load."""
    if not counts or not all(counts):
        return np.zeros((0, 0))
    counts_ME = np.array(counts, dtype=np.float64).sum(axis=0)
    return np.asarray(counts_ME / np.maximum(counts_ME.mean(axis=1, keepdims=True), 1e-9))
