"""Work side by side: results in order, one core each."""

from collections.abc import Iterator

import torch

from cavelight.train.workers import Workers


def test_workers_keep_the_order_and_begin_no_more_than_needed() -> None:
    threads, drawn = torch.get_num_threads(), []

    def items() -> Iterator[int]:
        for n in range(50):
            drawn.append(n)
            yield n

    results = Workers(2).map(lambda n: (n, torch.get_num_threads()), items())
    assert next(results) == (0, 1)
    assert len(drawn) <= 4
    assert [n for n, _ in results] == list(range(1, 50))
    assert torch.get_num_threads() == threads
