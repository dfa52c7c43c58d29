"""Independent pieces of work side by side, one core each.

Small models spend their time in operations too short to share among cores: two threads that wait for each other at
every one of them are hardly faster than one, and far slower when another program takes a core away. Whole
micro-batches side by side meet once a step. With two or more workers, results do not depend on their number.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


class Workers:
    """`count` threads that compute with one core each; one alone is the caller itself, with all of torch's threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = _single_core_threads(count) if count > 1 else None

    def map(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """The results in the items' order; at most one item more than there are workers is begun and not yet taken."""
        if self._threads is None:
            yield from map(work, items)
            return
        begun: deque[Future[Made]] = deque()
        for item in items:
            begun.append(self._threads.submit(work, item))
            if len(begun) > self.count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


ALONE = Workers(1)


def _single_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads that have all begun. Each one's setting is also torch's for threads to come: that is put back."""
    before, everybody = torch.get_num_threads(), Barrier(count + 1)
    threads = ThreadPoolExecutor(count, "worker", torch.set_num_threads, (1,))
    for _ in range(count):
        threads.submit(everybody.wait)
    everybody.wait()
    torch.set_num_threads(before)
    return threads
