"""Tensors side by side: results in order, and an end to what is under way."""

import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event as Flag

import pytest
import torch

from cavelight.spec.events import Event
from cavelight.weights import side_by_side as module
from cavelight.weights.side_by_side import THREADS, Progress, side_by_side


def quiet(event: Event) -> None:
    pass


def test_results_come_in_order_and_few_are_begun_ahead() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01 * (item % 3))
        return item

    results = side_by_side(work, range(20), Progress("a", 20, "", quiet))
    for expected, result in enumerate(results):
        assert result == expected and len(begun) <= result + 1 + THREADS


@pytest.mark.parametrize("end", ["closed", "an error"])
def test_what_is_under_way_ends_and_nothing_further_is_begun(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, called_off, working = Progress("a", 1, "", quiet), list[int](), Flag()

    def work(item: int) -> int:
        if item == 0:
            working.wait(60)
            if end == "an error":
                raise ValueError("of item 0")
            return item
        try:
            for _ in range(60_000):
                progress.add(1)
                working.set()
                time.sleep(0.001)
        except CancelledError:
            called_off.append(item)
            raise
        return item

    monkeypatch.setattr(module, "THREADS", 2)
    results = side_by_side(work, range(3), progress)
    if end == "an error":
        with pytest.raises(ValueError, match="of item 0"):
            next(results)
    else:
        assert next(results) == 0
        results.close()
    assert called_off and 0 not in called_off


def test_torch_has_as_many_threads_as_before() -> None:
    before, progress = torch.get_num_threads(), Progress("a", 3, "", quiet)
    try:
        torch.set_num_threads(3)
        assert list(side_by_side(lambda item: torch.get_num_threads(), range(3), progress)) == [1] * 3
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:  # threads to come have the setting that was made last, in whatever thread
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
