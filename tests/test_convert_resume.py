"""Conversion interrupted and continued, on full disks, and the audit at its end."""

import errno
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cavelight.errors import UserError
from cavelight.spec.events import Event, Phase
from cavelight.spec.formats import FP8, INT8, PLAIN
from cavelight.weights import blocks, journal
from cavelight.weights import convert as converting
from cavelight.weights.audit import Report
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint
from cavelight.weights.stored import Checkpoint

from .conversions import (
    BIAS,
    FORMATS,
    HEAD_COPY,
    change,
    content,
    equal,
    folder_of,
    journal_of,
    tensors_of,
    weights,
    write,
)
from .dying import convert_and_die


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", weights())


# Interrupted and continued


def stop_at(event: int) -> Callable[[Event], None]:
    """Ctrl-C at that event."""
    seen = 0

    def listen(told: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            raise KeyboardInterrupt

    return listen


def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    """Each call is killed a little later than the one before; what is left continues to the same bytes."""
    convert(source, tmp_path / "calm", FP8, shard_bytes=50_000)
    target, chance = tmp_path / "killed", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cavelight.weights.convert"])
    recorded = []
    for event in (1, 30, 15, 40):
        arguments = (source, target, FP8, 50_000, event + chance.randrange(10), chance.uniform(0, 0.01))
        process = context.Process(target=convert_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -9 and not target.exists()
        recorded.append(journal_of(target).read_bytes().count(b"\n") if journal_of(target).exists() else 0)
    assert recorded == sorted(recorded) and recorded[-1] > 10
    convert(source, target, FP8, shard_bytes=50_000)
    assert content(target) == content(tmp_path / "calm")
    assert not folder_of(target).exists()


def test_ctrl_c_keeps_what_is_finished(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", FP8, on_event=stop_at(40))
    finished = journal_of(tmp_path / "out").read_bytes().count(b"\n") - 1
    assert finished > 25 and not (tmp_path / "out").exists()
    told: list[Event] = []
    convert(source, tmp_path / "out", FP8, on_event=told.append)
    first = told[0]
    assert isinstance(first, Phase) and first.name == "converting" and 0 < first.done < first.total
    convert(source, tmp_path / "calm", FP8)
    assert content(tmp_path / "out") == content(tmp_path / "calm")


def test_stopped_in_the_audit(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", FP8)
    before = content(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", INT8, on_event=stop_at(100))
    assert content(tmp_path / "out") == before  # the old one stands until the new one is whole
    told: list[Event] = []
    convert(source, tmp_path / "out", INT8, on_event=told.append)
    assert isinstance(told[0], Phase) and told[0].done == told[0].total
    assert Checkpoint(tmp_path / "out").format == INT8


@pytest.mark.parametrize("tail", [b'{"name":"lm_head.weight","re', b"\0\0\0\0", b'{"name":\n'])
def test_a_torn_line_counts_for_nothing(source: Path, tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", FP8, on_event=stop_at(40))
    lines = journal_of(tmp_path / "out").read_bytes()
    journal_of(tmp_path / "out").write_bytes(lines + tail)
    convert(source, tmp_path / "out", FP8)
    convert(source, tmp_path / "calm", FP8)
    assert content(tmp_path / "out") == content(tmp_path / "calm")


def test_killed_between_the_last_two_steps(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: journal.Unfinished) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Unfinished, "remove", killed)
        convert(source, tmp_path / "out", FP8)
    stands = content(tmp_path / "out")
    told: list[Event] = []
    report = convert(source, tmp_path / "out", FP8, on_event=told.append)
    assert told == [] and report == Report.read(tmp_path / "out")  # nothing was done twice
    assert content(tmp_path / "out") == stands and not folder_of(tmp_path / "out").exists()


def test_killed_between_the_last_two_steps_and_then_asked_for_another_format(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Unfinished, "remove", lambda unfinished: stop_at(1)(Phase("a", 0, 0, "")))
        convert(source, tmp_path / "out", FP8)
    convert(source, tmp_path / "out", INT8)
    assert Checkpoint(tmp_path / "out").format == INT8 and not folder_of(tmp_path / "out").exists()


def test_files_beside_the_weights_that_went_meanwhile(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("of before")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", FP8, on_event=stop_at(100))
    assert (folder_of(tmp_path / "out") / "model" / "README.md").is_file()
    (source / "README.md").unlink()
    report = convert(source, tmp_path / "out", FP8)
    assert not (tmp_path / "out" / "README.md").exists() and "README.md" not in report.files


def test_another_conversion_that_was_begun(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", FP8, on_event=stop_at(40))
    with pytest.raises(
        UserError, match=r"beginning of another conversion. Got: format was .*fp8.* now it is .*int.*rm -r "
    ):
        convert(source, tmp_path / "out", INT8)
    with pytest.raises(UserError, match=r"Got: dtype was \"auto\", now it is \"float32\""):
        convert(source, tmp_path / "out", FP8, dtype=torch.float32)
    change(source, lm_head__weight=torch.zeros(48, 160, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"beginning of another conversion. Got: source was"):
        convert(source, tmp_path / "out", FP8)
    shutil.rmtree(folder_of(tmp_path / "out"))
    change(source, **{HEAD_COPY.replace(".", "__"): torch.zeros(48, 160, dtype=torch.bfloat16)})
    convert(source, tmp_path / "out", INT8)


def test_two_at_once(source: Path, tmp_path: Path) -> None:
    refused = []

    def listen(told: Event) -> None:
        if not refused:
            with pytest.raises(UserError, match="Another process is writing") as caught:
                convert(source, tmp_path / "out", FP8)
            refused.append(caught.value)

    convert(source, tmp_path / "out", FP8, on_event=listen)
    assert refused and Checkpoint(tmp_path / "out").format == FP8


# Disks


def test_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"no room .*0.00 GB free"):
        convert(source, tmp_path / "out", PLAIN)
    monkeypatch.undo()
    convert(source, tmp_path / "out", FP8)  # nothing was made yet, so nothing stands in its way


def test_room_for_what_is_still_to_be_written_is_enough(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", FP8, on_event=stop_at(100))  # in the audit
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage)
    convert(source, tmp_path / "out", FP8)


def test_a_disk_that_fills_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, written = os.pwrite, 0

    def on_small_disk(handle: int, data: memoryview, start: int) -> int:
        nonlocal written
        written += len(data)
        if written > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, data, start)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"disk is full while writing .*out.*same command"),
    ):
        patch.setattr(os, "pwrite", on_small_disk)
        convert(source, tmp_path / "out", PLAIN)
    assert journal_of(tmp_path / "out").read_bytes().count(b"\n") > 10
    told: list[Event] = []
    convert(source, tmp_path / "out", PLAIN, on_event=told.append)
    assert isinstance(told[0], Phase) and told[0].done > 100_000


def test_what_a_disk_would_not_keep_is_not_in_the_journal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, failed = journal.sync, False

    def fails_once(path: Path) -> None:  # as disks do that find out late that they are full
        nonlocal failed
        if path.suffix == ".safetensors" and not failed:
            failed = True
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(journal, "sync", fails_once)
    with pytest.raises(UserError, match="disk is full"):
        convert(source, tmp_path / "out", FP8)
    assert journal_of(tmp_path / "out").read_bytes().count(b"\n") == 1
    convert(source, tmp_path / "out", FP8)


def test_a_volume_that_cannot_be_moved(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def busy(old: Path, new: Path) -> None:
        if Path(old) == tmp_path / "out":
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(old, new)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UserError, match=r"cannot be replaced.*volume.*move .*\.out\.converting/model"):
        convert(source, tmp_path / "out", FP8)
    assert read_checkpoint(folder_of(tmp_path / "out") / "model")


def test_the_checkpoint_that_was_being_replaced_is_named_before_a_folder_is_to_be_deleted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "out", INT8)
    replace = os.replace

    def killed(old: Path, new: Path) -> None:
        if Path(old).name == "model":
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        convert(source, tmp_path / "out", FP8)
    with pytest.raises(UserError, match=r"move .*/replaced away, the checkpoint that stood here before, then delete"):
        convert(source, tmp_path / "out", PLAIN)
    assert Checkpoint(folder_of(tmp_path / "out") / "replaced").format == INT8
    convert(source, tmp_path / "out", FP8)
    assert Checkpoint(tmp_path / "out").format == FP8 and not folder_of(tmp_path / "out").exists()


# The audit


def spoil(monkeypatch: pytest.MonkeyPatch, what: Callable[[Path], None]) -> None:
    """Do something to the shards after they are written and before the audit looks."""
    write_rest = converting._write_rest

    def and_spoil(source: Checkpoint, work: Any, folder: Path) -> Any:
        what(folder)
        return write_rest(source, work, folder)

    monkeypatch.setattr(converting, "_write_rest", and_spoil)


def flip_a_bit(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))


def add_a_tensor(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"more": torch.ones(1)}, folder / "model.safetensors")


def touch_the_source(folder: Path) -> None:
    os.utime(folder.parents[1] / "source/model.safetensors", (1, 1))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (flip_a_bit, "What lies on the disk is not what was written to it"),
        (add_a_tensor, "The files written hold other tensors .*Got: .*more"),
        (touch_the_source, "The source has changed"),
    ],
)
def test_the_audit_finds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[[Path], None], message: str
) -> None:
    spoil(monkeypatch, what)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", FP8)
    assert not (tmp_path / "out").exists() and folder_of(tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "factor"), [("fp8", 1.1), ("int8", 1.01), ("int4", 1.2)])
def test_the_audit_finds_a_packing_that_is_wrong(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, factor: float
) -> None:
    """Scales a little too large lose more than the format explains."""
    pack = blocks.pack

    def wrong(rows: Tensor, *others: Any) -> dict[str, Tensor]:
        return {n: (t * factor).to(t.dtype) if "_scale" in n else t for n, t in pack(rows, *others).items()}

    monkeypatch.setattr(blocks, "pack", wrong)
    with pytest.raises(UserError, match="Values lost more than quantised explains"):
        convert(source, tmp_path / "out", FORMATS[to])


def test_the_audit_finds_a_wrong_cast(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for_export = blocks.for_export
    monkeypatch.setattr(blocks, "for_export", lambda bias_E, shift: for_export(bias_E, shift) + 1)
    with pytest.raises(UserError, match=f"Values that were to be bias shifted are not. Got: {BIAS}"):
        convert(source, tmp_path / "out", PLAIN)


def test_what_we_save_converts(tmp_path: Path) -> None:
    """Our own exports are checkpoints like any other."""
    write_checkpoint(read_checkpoint(write(tmp_path / "source", weights())), tmp_path / "export")
    assert convert(tmp_path / "export", tmp_path / "out", PLAIN).rules == {"copied": len(weights())}
    assert equal(tensors_of(tmp_path / "export"), tensors_of(tmp_path / "out"))
