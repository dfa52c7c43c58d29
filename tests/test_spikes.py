"""What is a spike, and what a run does about one."""

import math
import random
from statistics import fmean, pvariance

import pytest

from cavelight.train.spikes import FEWEST, SpikeWatch

FACTOR = 6.0


def watched(losses: list[float]) -> SpikeWatch:
    watch = SpikeWatch()
    for loss in losses:
        watch.take(loss, FACTOR, skipped=False)
    return watch


def noisy(count: int, mean: float = 3.0, deviation: float = 0.1) -> list[float]:
    source = random.Random(0)
    return [source.gauss(mean, deviation) for _ in range(count)]


def test_mean_and_variance_are_those_of_the_losses_at_first() -> None:
    losses = noisy(40)
    watch = watched(losses)
    assert watch.mean == pytest.approx(fmean(losses))
    assert watch.variance == pytest.approx(pvariance(losses))


def test_nothing_is_a_spike_before_enough_was_seen() -> None:
    assert watched(noisy(FEWEST - 1)).ceiling(FACTOR) == math.inf
    assert watched(noisy(FEWEST)).ceiling(FACTOR) == pytest.approx(3.0 + FACTOR * 0.1, abs=0.2)


def test_an_ordinary_run_has_no_spikes_and_a_steep_one_neither() -> None:
    watch, steep = SpikeWatch(), SpikeWatch()
    for step, noise in enumerate(noisy(3000, mean=0.0)):
        for each, loss in ((watch, 3 + noise), (steep, 2 + 8 * math.exp(-step / 300) + noise)):
            assert loss <= each.ceiling(FACTOR), step
            each.take(loss, FACTOR, skipped=False)


def test_a_spike_hardly_moves_the_mean_and_nan_does_not_at_all() -> None:
    watch = watched(noisy(500))
    mean, ceiling = watch.mean, watch.ceiling(FACTOR)
    assert ceiling < 100.0
    watch.take(100.0, FACTOR, skipped=True)
    assert watch.mean - mean < 0.02 and watch.ceiling(FACTOR) < ceiling + 0.3
    before = (watch.mean, watch.variance, watch.seen)
    watch.take(math.nan, FACTOR, skipped=True)
    assert (watch.mean, watch.variance, watch.seen) == before and watch.left_out == 2


def test_losses_that_stay_up_are_believed_before_a_run_is_given_up() -> None:
    watch, left_out = watched(noisy(500)), 0
    while watch.ceiling(FACTOR) < 5.0:
        watch.take(5.0, FACTOR, skipped=True)
        left_out += 1
    assert 2 <= left_out <= 15
    watch.take(5.0, FACTOR, skipped=False)
    assert watch.left_out == 0
