"""A shuffle of any number of things without a list of them: where each goes is computed by itself."""

from collections.abc import Hashable
from hashlib import sha256
from math import isqrt

ROUNDS = 8
_64_BITS = (1 << 64) - 1


class Permutation:
    """A permutation of 0 ... n - 1 chosen by `key`, the same everywhere and always.

    A number is written with two digits, and in each round one digit is moved on by a hash of the other: a Feistel
    network whose digits need not be bits (Black and Rogaway 2002, section 5). The two digits have room for a little
    more than n numbers; one that leaves the range goes through again until it is back.
    """

    def __init__(self, n: int, key: Hashable) -> None:
        self.n = n
        self._columns = max(1, isqrt(n - 1) + 1)
        self._rows = -(-n // self._columns)
        digests = [sha256(repr((key, number)).encode()).digest() for number in range(ROUNDS)]
        self._keys = [int.from_bytes(digest[:8], "little") for digest in digests]

    def __call__(self, number: int) -> int:
        if not 0 <= number < self.n:
            raise ValueError(f"{number} is not between 0 and {self.n - 1}")
        while True:
            left, right = divmod(number, self._columns)
            for place, key in enumerate(self._keys):
                if place % 2:
                    right = (right + _mixed(left ^ key)) % self._columns
                else:
                    left = (left + _mixed(right ^ key)) % self._rows
            number = left * self._columns + right
            if number < self.n:
                return number


def _mixed(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on 64 bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return value ^ (value >> 31)
