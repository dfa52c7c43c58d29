"""The golden trajectory: 20 training steps, compared with the text that is kept of them."""

from itertools import pairwise

import numpy as np
import pytest

from cavelight.train.optim import learning_rate
from cavelight.train.workers import Workers

from . import golden


def numbers(lines: list[str]) -> np.ndarray:
    return np.array([[float(word) for word in line.split()] for line in lines[1:]])


def test_twenty_steps_go_as_they_went_before() -> None:
    """Another processor may round the last bit otherwise; 20 steps let that grow to no more than 1e-4 here.

    A token close to two experts may then go to the other: counts may differ by two in a layer's expert, losses not.
    """
    kept = golden.FILE.read_text(encoding="utf-8").splitlines()
    now = list(golden.trajectory())
    assert kept[0] == now[0]
    expected, got = numbers(kept), numbers(now)
    np.testing.assert_allclose(got[:, :5], expected[:, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[:, 5:], expected[:, 5:], atol=2)


def test_the_same_seed_gives_the_same_run_to_the_bit() -> None:
    assert list(golden.trajectory()) == list(golden.trajectory())


def test_micro_batches_side_by_side_give_the_same_bits() -> None:
    assert list(golden.trajectory(Workers(2))) == list(golden.trajectory())


def test_learning_rate_warms_up_then_falls_to_its_end() -> None:
    recipe = golden.RECIPE
    rates = [learning_rate(recipe, step, step / golden.STEPS) for step in range(golden.STEPS)]
    assert rates[:5] == pytest.approx([recipe.learning_rate * (i + 1) / 5 for i in range(5)])
    assert all(later < earlier for earlier, later in pairwise(rates[5:]))
    assert learning_rate(recipe, golden.STEPS, 1.0) == pytest.approx(recipe.final_learning_rate)
