"""Independent tensors side by side: reading, checksums, packing and writing all let other threads run meanwhile."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import torch

from cavelight.spec.events import Event, Phase

THREADS = min(4, os.cpu_count() or 1)  # a few keep a disk busy; each has blocks of its own in memory
TICK = 0.25  # seconds

Item = TypeVar("Item")
Made = TypeVar("Made")


class Progress:
    """A count that any thread adds to and one tells. Whoever adds after `stop` is called off."""

    def __init__(self, name: str, total: int, unit: str, on_event: Callable[[Event], None], done: int = 0) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._on_event, self._lock, self._stopped = on_event, Lock(), False

    def add(self, count: int) -> None:
        if self._stopped:
            raise CancelledError
        with self._lock:
            self.done += count

    def tell(self) -> None:
        self._on_event(Phase(self.name, self.done, self.total, self.unit))

    def stop(self) -> None:
        self._stopped = True


def side_by_side(work: Callable[[Item], Made], items: Iterable[Item], progress: Progress) -> Generator[Made]:
    """The results in the items' order, a few items begun ahead; meanwhile progress is told.

    When closed, or on an error or Ctrl-C, nothing further is begun, and what is under way ends where it next adds to
    the progress.
    """
    before, begun = torch.get_num_threads(), deque[Future[Made]]()
    threads = ThreadPoolExecutor(THREADS, "tensor", torch.set_num_threads, (1,))

    def first() -> Made:
        future = begun.popleft()
        while not future.done():
            try:
                future.exception(TICK)
            except TimeoutError:
                progress.tell()
        return future.result()

    try:
        progress.tell()
        for item in items:
            begun.append(threads.submit(work, item))
            if len(begun) > THREADS:
                yield first()
        while begun:
            yield first()
        progress.tell()
    finally:
        progress.stop()
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the threads' own setting is also torch's for threads to come
