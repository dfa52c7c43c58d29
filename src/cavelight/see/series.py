"""A run's metrics.jsonl as arrays. Pure numbers: what the figures draw and what the tables say comes from here.

Letters: P steps (points of a curve), M MoE layers with the MTP modules' last, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cavelight.spec.config import ModelConfig

Floats = NDArray[np.float64]

MOST_POINTS = 60  # a smoothed curve averages over a window of steps / MOST_POINTS


@dataclass(frozen=True)
class Series:
    """What a run logged, step by step; what was not finite is NaN. Looks at held-out text stand apart.

    load_ME is how often each expert was chosen in the last tenth of the steps, relative to an even share (1.0).
    """

    step_P: NDArray[np.int64]
    tokens_P: NDArray[np.int64]
    loss_P: Floats
    mtp_loss_P: Floats
    grad_norm_P: Floats
    learning_rate_P: Floats
    max_vio_PM: Floats
    load_ME: Floats
    seconds: float
    looks: tuple[tuple[int, float], ...]  # (step, held-out bits per byte), each at the same small sample
    final: tuple[int, float] | None  # the same over all held-out text, where the run got so far

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, Any]]) -> Self:
        """From the lines of a metrics.jsonl, as train.state.read_metrics returns them."""
        steps = [line for line in metrics if line["kind"] == "step"]
        looks = [line for line in metrics if line["kind"] == "evaluated"]
        whole = [(line["step"], line["bits_per_byte"]) for line in looks if line["whole"]]
        return cls(
            step_P=np.array([line["step"] for line in steps], dtype=np.int64),
            tokens_P=np.array([line["tokens"] for line in steps], dtype=np.int64),
            loss_P=_finite([line["loss"] for line in steps]),
            mtp_loss_P=_finite([line["mtp_loss"] for line in steps]),
            grad_norm_P=_finite([line["grad_norm"] for line in steps]),
            learning_rate_P=_finite([line["learning_rate"] for line in steps]),
            max_vio_PM=_finite([line["max_vio"] for line in steps]).reshape(len(steps), -1 if steps else 0),
            load_ME=_load([line["counts"] for line in steps[-last_tenth(len(steps)) :]]),
            seconds=steps[-1]["seconds"] if steps else 0.0,
            looks=tuple((line["step"], line["bits_per_byte"]) for line in looks if not line["whole"]),
            final=whole[-1] if whole else None,
        )

    @property
    def has_mtp(self) -> bool:
        return bool(np.any(self.mtp_loss_P != 0))

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


def _finite(values: Sequence[Any]) -> Floats:
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _load(counts: Sequence[Sequence[Sequence[int]]]) -> Floats:
    """Counts of some steps, [steps][M][E], as each expert's share of an even load."""
    if not counts or not counts[0]:
        return np.zeros((0, 0))
    counts_ME = np.array(counts, dtype=np.float64).sum(axis=0)
    return np.asarray(counts_ME / np.maximum(counts_ME.mean(axis=1, keepdims=True), 1e-9))
