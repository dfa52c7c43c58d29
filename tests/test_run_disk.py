"""Runs on a disk that fills up or is slow, and what they write."""

import errno
import os
import time
import weakref
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from bench.peak import slow_saves
from typer.testing import CliRunner

from cavelight.cli.main import app
from cavelight.data.batches import Batch, Batches
from cavelight.errors import UserError
from cavelight.spec.events import Evaluated, Event, Note, Sampled, Saved, Step
from cavelight.spec.recipe import Recipe
from cavelight.train import checkpoints, loop, metrics, state, step
from cavelight.train.checkpoints import Snapshot, saved_steps
from cavelight.train.metrics import OF_THE_CLOCK
from cavelight.train.state import RunFolder, read_metrics

from .runs import assert_same, changed, corpus, lines, recipe

__all__ = ["corpus", "recipe"]  # fixtures


def test_saves_are_pruned_by_the_rule(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(changed(recipe, save_every=1, keep_saves=1, keep_every=4), tmp_path / "run")
    assert saved_steps(RunFolder(tmp_path / "run").saves) == [4, 6]


def disk_full_for(attempts: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The saves with these numbers, from 1, find no room."""
    calls = count(1)

    def write(path: Path, tensors: Any) -> int:
        if path.name == "optimizer.safetensors" and next(calls) in attempts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_tensors(path, tensors)

    write_tensors = checkpoints._write_tensors
    monkeypatch.setattr(checkpoints, "_write_tensors", write)


def test_a_disk_that_fills_up_does_not_stop_a_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(recipe, tmp_path / "whole")
    disk_full_for({2}, monkeypatch)
    heard: list[Event] = []
    result = loop.train(recipe, tmp_path / "run", heard.append)
    assert result.steps == 6 and not result.interrupted
    assert sum(isinstance(event, Note) and "disk is full" in event.text for event in heard) == 1
    assert saved_steps(RunFolder(tmp_path / "run").saves) == [2, 6]
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        disk_full_for({3, 4}, patched)
        with pytest.raises(UserError, match="disk is full"):
            loop.train(recipe, tmp_path / "run")
    assert saved_steps(RunFolder(tmp_path / "run").saves) == [2, 4]
    loop.train(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_lines_of_the_log_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line that still found room is taken back at once."""
    log, room = metrics.MetricsLog(tmp_path / "metrics.jsonl", 0), 40

    def write(handle: int, data: bytes) -> int:
        space = room - os.fstat(handle).st_size
        if space <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data[:space])

    real = os.write
    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        log.write("step", {"step": number})
    assert [line["step"] for line in read_metrics(log.path)] == [0]
    assert log.path.read_bytes().endswith(b"\n")
    with pytest.raises(UserError, match="disk is full"):
        log.flush()
    room = 10_000
    log.write("step", {"step": 3})
    log.flush()
    assert [line["step"] for line in read_metrics(log.path)] == [0, 1, 2, 3]
    assert log.size == log.path.stat().st_size


def test_numbers_that_are_not_finite_are_null_as_json_has_it(tmp_path: Path) -> None:
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write("spike", {"loss": float("nan"), "more": [1.5, float("inf")], "deep": {"low": -float("inf")}})
    assert log.path.read_text() == '{"kind": "spike", "loss": null, "more": [1.5, null], "deep": {"low": null}}\n'


def test_a_slow_store_holds_no_step_up(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes as long as computing: side by side they take little more than one of them."""
    rows, pause, took = Batches.rows, 0.2, []

    def slow(self: Batches, first: int, number: int) -> Batch:
        time.sleep(pause / 2)  # two micro-batches a step
        return rows(self, first, number)

    def train_step(*arguments: Any, **more: Any) -> step.StepResult:
        began = time.monotonic()
        result = step.train_step(*arguments, **more)
        time.sleep(max(0.0, 1.25 * pause - (time.monotonic() - began)))
        took.append(time.monotonic())
        return result

    monkeypatch.setattr(Batches, "rows", slow)
    monkeypatch.setattr(loop, "train_step", train_step)
    loop.train(changed(recipe, evaluate_every=None, save_every=None), tmp_path / "run")
    assert (took[-1] - took[0]) / 5 < 1.8 * pause  # in turn it would be 2.25


def test_a_run_says_what_it_does(recipe: Recipe, tmp_path: Path) -> None:
    heard: list[Event] = []
    loop.train(changed(recipe, ema_decay=0.9), tmp_path / "run", heard.append)
    assert {type(event) for event in heard} >= {Step, Evaluated, Sampled, Saved, Note}
    told = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert {line["kind"] for line in told} == {"step", "evaluated", "sampled"}
    for line in told:
        if line["kind"] == "step":
            assert line.keys() >= OF_THE_CLOCK and line["peak_share"] > 0 and line["bias_range"][0] > 0
            assert len(line["mtp_losses"]) == 1 and len(line["counts"]) == len(line["max_vio"])
        if line["kind"] == "sampled":
            assert line["prompt"].startswith("line") and len(line["acceptance"]) == 1
        if line["kind"] == "evaluated":
            assert 0 < line["average_bits_per_byte"] < 10
    assert sum(isinstance(event, Sampled) for event in heard) == 2  # one a look, and none twice at the last step


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"\x00\x00\x00", b"[1]", b"", b'{"step": "\xff"}'])
def test_a_damaged_line_of_a_log_is_named_and_a_last_one_that_is_not_ended_left_out(
    damage: bytes, tmp_path: Path
) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n' + damage)
    assert read_metrics(log) == [{"step": 1}]
    log.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is damaged"):
        read_metrics(log)
    shown = CliRunner().invoke(app, ["look", str(tmp_path)])
    assert shown.exit_code == 2
    assert "metrics.jsonl:2 is damaged" in shown.stderr


def test_on_a_slow_disk_there_is_one_copy_of_the_state(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[weakref.ref[Snapshot]] = []
    other: list[int] = []

    def take(*arguments: Any) -> Snapshot:
        other.append(sum(snapshot() is not None for snapshot in taken))
        snapshot = state.take(*arguments)
        taken.append(weakref.ref(snapshot))
        return snapshot

    monkeypatch.setattr(loop, "take", take)
    with slow_saves():  # each is under way until the next one begins
        loop.train(changed(recipe, save_every=1, keep_saves=2), tmp_path / "run")
    assert len(other) > 5 and not any(other) and saved_steps(RunFolder(tmp_path / "run").saves) == [5, 6]
