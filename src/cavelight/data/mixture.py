"""Which source each row of a mixture comes from: in proportion to the weights, at every moment.

Letters: K sources, P rows of a period, n rows so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

import numpy as np
from numpy.typing import NDArray

from cavelight.data.store import TokenStore

LONGEST_PERIOD = 100_000  # weights that would need a longer one are rounded to so many parts


@dataclass(frozen=True)
class Mixture:
    """Token stores, and the weights in proportion to which rows are drawn from them; alike by default."""

    stores: tuple[TokenStore, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.stores))
        if len(self.weights) != len(self.stores) or not self.stores or min(self.weights) <= 0:
            raise ValueError(f"{len(self.stores)} stores with the weights {self.weights}")

    def __len__(self) -> int:
        """Tokens of all stores."""
        return sum(map(len, self.stores))


class Draw:
    """The order of sources: after n rows, each has had less than one more or less than its share of n.

    It is Tijdeman's solution of the chairman assignment problem (1980), worked out for the shortest period after which
    all shares are whole.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        rows_K = whole_shares(weights)
        self._rows_K = np.array(rows_K)
        self._source_P = _order(rows_K)
        # How many rows of the same source a period has before each of its rows.
        self._before_P = np.zeros(len(self._source_P), np.int32)
        for source in range(len(rows_K)):
            places = np.flatnonzero(self._source_P == source)
            self._before_P[places] = np.arange(len(places))

    def __call__(self, row: int) -> tuple[int, int]:
        """The source of the row with this number, and the row's number within that source; both from 0."""
        period, place = divmod(row, len(self._source_P))
        source = int(self._source_P[place])
        return source, period * int(self._rows_K[source]) + int(self._before_P[place])


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` as they are written in decimals, with the smallest sum.

    Where that sum exceeds LONGEST_PERIOD they are rounded to it by the largest remainders, each to 1 at least.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    parts = 1
    for share in shares:
        parts *= share.denominator // gcd(parts, share.denominator)
    if parts <= LONGEST_PERIOD:
        return [int(share * parts) for share in shares]
    scaled = [share * (LONGEST_PERIOD - len(shares)) for share in shares]
    rows = [1 + int(share) for share in scaled]
    by_remainder = sorted(range(len(shares)), key=lambda source: int(scaled[source]) - scaled[source])
    for source in by_remainder[: LONGEST_PERIOD - sum(rows)]:
        rows[source] += 1
    return rows


def _order(rows_K: list[int]) -> NDArray[np.int32]:
    sources, period = range(len(rows_K)), sum(rows_K)
    if len(rows_K) == 1:
        return np.zeros(period, np.int32)
    slack = 2 * len(rows_K) - 2
    order = np.empty(period, np.int32)
    behind = [0] * len(rows_K)  # by how much each source lags its share, times P
    for place in range(period):
        behind = [lag + rows for lag, rows in zip(behind, rows_K, strict=True)]
        # Among the sources that may have this row, the one that must have its next row first.
        may = (source for source in sources if behind[source] * slack >= period)
        chosen = min(may, key=lambda k: Fraction((slack - 1) * period - slack * behind[k], rows_K[k]))
        behind[chosen] -= period
        order[place] = chosen
    return order
