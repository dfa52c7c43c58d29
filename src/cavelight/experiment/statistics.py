"""Means of a few seeds, and how far they can be trusted: standard errors, t-intervals, paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

LEVEL = 0.95  # of all intervals


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `count` seeds, its standard error, and the half-width of its t-interval at LEVEL.

    With a single seed nothing is known of chance: error and half-width are infinite.
    """

    mean: float
    error: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, s / sqrt(n) with n - 1 degrees of freedom, and t times that."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.inf, math.inf, 1)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Estimate(mean, error, quantile(count - 1) * error, count)


def paired(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """values - reference, seed by seed: what both owe to the seed (data's order, above all) falls out."""
    return estimate([value - other for value, other in zip(values, reference, strict=True)])


@cache
def quantile(degrees: int, level: float = LEVEL) -> float:
    """t such that Student's t with so many degrees of freedom lies within -t and t with probability `level`."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(-t < T < t), the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if degrees % 2 == 0:
        term = total = 1.0
        for k in range(2, degrees - 1, 2):
            term *= square * (k - 1) / k
            total += term
        return sine * total
    term = total = math.cos(angle) if degrees > 1 else 0.0
    for k in range(3, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total)
