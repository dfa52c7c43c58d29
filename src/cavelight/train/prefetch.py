"""Micro-batches made ready in a thread of their own, so that reading the corpus never holds a step up."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cavelight.data.batches import Batch


class Prefetch:
    """`rows(first, count)` from row `first` on, count after count, always `ahead` calls in advance.

    What comes does not depend on when it is asked for; what a call raises, `take` raises in its turn.
    """

    def __init__(self, rows: Callable[[int, int], Batch], first: int, count: int, ahead: int) -> None:
        self.rows, self.next, self.count = rows, first, count
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._begun: deque[Future[Batch]] = deque()
        for _ in range(ahead):
            self._begin()

    def take(self) -> Batch:
        """The next micro-batch."""
        self._begin()
        return self._begun.popleft().result()

    def close(self) -> None:
        """Leave undone what was not begun."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        self._begun.append(self._thread.submit(self.rows, self.next, self.count))
        self.next += self.count
