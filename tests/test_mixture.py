"""Mixtures keep to their weights at every row; the shuffle is a permutation, looks like one, and never changes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cavelight.data.mixture import LONGEST_PERIOD, Draw, Mixture, whole_shares
from cavelight.data.shuffle import Permutation
from cavelight.data.store import TokenStore

weights = st.lists(st.integers(1, 40).map(lambda parts: parts / 4), min_size=1, max_size=6)


@settings(deadline=None)
@given(weights)
@example([0.1, 0.2, 0.7])
@example([10.0, 0.25, 0.25, 0.25, 0.25])
def test_after_any_number_of_rows_each_source_has_its_share(weights: list[float]) -> None:
    draw, had = Draw(weights), Counter[int]()
    for row in range(400):
        source, number = draw(row)
        assert number == had[source]  # its rows come in order, none twice and none left out
        had[source] += 1
        for other, weight in enumerate(weights):
            assert abs(had[other] - (row + 1) * weight / sum(weights)) < 1 - 1e-9


def test_rows_far_away_are_found_at_once() -> None:
    draw = Draw([0.7, 0.2, 0.1])
    assert draw(10**15) == (draw(0)[0], 7 * 10**14 + draw(0)[1])


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_shares_are_the_weights(weights: list[float]) -> None:
    rows = whole_shares(weights)
    assert min(rows) >= 1 and sum(rows) <= LONGEST_PERIOD
    for number, weight in zip(rows, weights, strict=True):
        assert abs(number / sum(rows) - weight / sum(weights)) <= 1e-4


def test_shares_are_exact_where_they_can_be() -> None:
    assert whole_shares([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_shares([0.5, 0.5]) == whole_shares([1.0, 1.0]) == [1, 1]
    assert whole_shares([3.0]) == [1]
    assert sum(whole_shares([0.123456789, 0.2, 0.9])) == LONGEST_PERIOD


def test_a_mixture_is_checked() -> None:
    store = TokenStore(np.zeros(3, np.uint16), np.array([0, 3]), np.array([1]))
    assert Mixture((store, store)).weights == (1.0, 1.0) and len(Mixture((store, store))) == 6
    for stores, shares in (((), ()), ((store,), (1.0, 2.0)), ((store, store), (1.0, 0.0))):
        with pytest.raises(ValueError, match="stores with the weights"):
            Mixture(stores, shares)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers())
def test_each_number_goes_to_one_place(n: int, key: int) -> None:
    shuffle = Permutation(n, key)
    assert sorted(map(shuffle, range(n))) == list(range(n))


def test_it_looks_shuffled() -> None:
    """Correlation with the order, between neighbours and between keys; displacements; fixed points: as by chance."""
    n = 10_000
    one, two = (np.array([Permutation(n, key)(i) for i in range(n)]) for key in ("one", "two"))
    bound = 4 / np.sqrt(n)
    assert abs(np.corrcoef(one, np.arange(n))[0, 1]) < bound
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < bound
    assert abs(np.corrcoef(one, two)[0, 1]) < bound
    assert (one == np.arange(n)).sum() < 8
    assert abs(np.abs(one - np.arange(n)).mean() / (n / 3) - 1) < bound
    assert (np.abs(np.diff(one)) == 1).sum() < 12  # 2 are to be expected
    where = np.bincount(one[: n // 10] * 10 // n, minlength=10)  # of the first tenth, a tenth in each tenth
    assert (np.abs(where - n / 100) < 4 * np.sqrt(n / 100)).all()


def test_small_ones_reach_every_order() -> None:
    orders = Counter(tuple(map(Permutation(3, key), range(3))) for key in range(600))
    assert len(orders) == 6 and min(orders.values()) > 50


def test_it_is_the_same_for_ever() -> None:
    assert [Permutation(10, (0, 0, 0))(i) for i in range(10)] == [6, 4, 8, 7, 2, 5, 9, 3, 1, 0]
    assert [Permutation(6_000_000_000, (1, 2, 3))(i) for i in (0, 1, 5_999_999_999)] == [
        5735612654,
        3940300363,
        3835348093,
    ]
    with pytest.raises(ValueError, match="10 is not between 0 and 9"):
        Permutation(10, 0)(10)
