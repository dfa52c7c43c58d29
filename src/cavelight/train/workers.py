"""Independent pieces of work side by side, one core each.

Small models spend their time in operations too short to share among cores: two threads that wait for each other at
every one of them are hardly faster than one, and far slower when another program takes a core away. Whole
micro-batches side by side meet once a step. What each computes does not depend on how many run at once.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


class Workers:
    """`count` threads that compute with one core each; one alone is the caller itself, with all of torch's threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count, "worker", torch.set_num_threads, (1,)) if count > 1 else None

    def map(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """The results in the items' order."""
        return self._threads.map(work, items) if self._threads else map(work, items)


ALONE = Workers(1)
