"""The journal of a conversion by itself: torn ends, folders that go under way, and failures of the last step."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from cavelight.disk import folder_beside
from cavelight.errors import UserError
from cavelight.weights.files import Shard
from cavelight.weights.journal import Done, Unfinished

TASK = {"made": "here"}
SHARD = Shard("a.safetensors", b"header", {"x": 6, "y": 7}, 8)


def finish(path: Path, name: str) -> set[str]:
    """Finish one tensor. Returns what was finished before."""
    with Unfinished(path, TASK) as unfinished:
        before = set(unfinished.done)
        unfinished.finish(Done(name, {}, {name: 0}), 1)
    return before


@pytest.mark.parametrize("tail", [b'{"na', b'{"name": "x"', b"\x00\x00\n"])
def test_what_follows_a_torn_end_counts(tmp_path: Path, tail: bytes) -> None:
    """The end is cut off, or what is written behind it would be lost with it."""
    folder = tmp_path / "out"
    assert finish(folder, "x") == set()
    with open(folder / "journal.jsonl", "ab") as file:
        file.write(tail)
    assert finish(folder, "y") == {"x"}
    assert finish(folder, "z") == {"x", "y"}


@pytest.mark.parametrize("left", ["nothing", "another journal"])
def test_who_had_the_lock_has_cleared_up(tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal that was opened is none any more; what is written to it would be lost."""
    folder, flock = tmp_path / "out", fcntl.flock

    def late(file: int, how: int) -> None:
        shutil.rmtree(folder)
        if left == "another journal":
            folder.mkdir()
            (folder / "journal.jsonl").touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="Another process is writing"):
        Unfinished(folder, TASK)


def test_a_full_disk_takes_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, folder = os.write, tmp_path / "out"
    finish(folder, "x")
    before = (folder / "journal.jsonl").read_bytes()
    room = [5]

    def full(file: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: room.pop()])

    with monkeypatch.context() as patch, Unfinished(folder, TASK) as unfinished:
        unfinished.finish(Done("y", {}, {"y": 0}), 1)
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            unfinished.sync()
    assert (folder / "journal.jsonl").read_bytes() == before
    assert finish(folder, "z") == {"x"}


@pytest.mark.parametrize("name", ["x", "another"])
def test_a_shard_that_is_not_as_it_was_left(tmp_path: Path, name: str) -> None:
    """It may be made anew while nothing of it was finished, and not after."""
    folder = tmp_path / "out"
    finish(folder, name)
    with Unfinished(folder, TASK) as unfinished:
        if name == "x":
            with pytest.raises(UserError, match="is not as the conversion left it"):
                unfinished.prepare([SHARD])
        else:
            unfinished.prepare([SHARD])
            assert (folder / "model" / SHARD.file).read_bytes() == b"header\0\0"


def test_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood there before stands there again, and the new one is kept."""
    target, replace = tmp_path / "target", os.replace
    target.mkdir()
    (target / "old").touch()

    def fails(old: Path, new: Path) -> None:
        if Path(old).name == "model":
            raise OSError(errno.EIO, "Input/output error")
        replace(old, new)

    with Unfinished(tmp_path / "out", TASK) as unfinished:
        unfinished.prepare([SHARD])
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(os, "replace", fails)
            unfinished.become(target)
        assert [file.name for file in target.iterdir()] == ["old"]
        unfinished.become(target)
    assert [file.name for file in target.iterdir()] == [SHARD.file]
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


def test_a_folder_whose_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where it is no conversion that is saved."""
    target, replace = tmp_path / "target", os.replace
    target.mkdir()
    (target / "old").touch()

    def fails(old: Path, new: Path) -> None:
        if Path(old).name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output"), folder_beside(target) as scratch:
        (scratch / "new").touch()
    assert [file.name for file in target.iterdir()] == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


def test_a_journal_says_what_is_made_and_what_is_done(tmp_path: Path) -> None:
    finish(tmp_path / "out", "x")
    lines = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [TASK, {"name": "x", "read": {}, "written": {"x": 0}}]
