"""A folder of weights that is filled over hours and outlives kills, full disks and power cuts.

Beside the shards lies a journal in JSON lines: first what is being made, then each tensor once its bytes are safe on
the disk. A line that was cut off counts for nothing; what it spoke of is written again, to the same place.
"""

import errno
import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from cavelight.disk import flush, sync
from cavelight.errors import UserError
from cavelight.weights.files import Shard

SYNC_BYTES, SYNC_SECONDS = 256 * 2**20, 10.0  # a kill loses no more than either, and the tensors just under way


@dataclass(frozen=True, slots=True)
class Done:
    """A finished tensor: crc32 of each stored tensor that was read for it, and of each that was written."""

    name: str
    read: dict[str, int]
    written: dict[str, int]


class Unfinished:
    """The folder `path`: its `model` folder with the shards, and the journal, locked against a second process.

    `task` says in plain JSON what is being made; `done` is what earlier calls with the same task have finished. Raises
    UserError if another process is at work here, or if the folder holds the beginning of something else.
    `emptied` says that the shards were here and have gone: a call was killed after `become` had moved them.
    """

    def __init__(self, path: Path, task: Mapping[str, Any]) -> None:
        self.path, self.model = path, path / "model"
        self.emptied = False
        self.done: dict[str, Done] = {}
        self._dirty: set[str] = set()  # files that hold what the disk may not have yet
        self._lock = Lock()
        self._waiting: list[Done] = []  # written, perhaps not on the disk yet
        self._waiting_bytes, self._synced = 0, time.monotonic()
        path.mkdir(parents=True, exist_ok=True)
        self._journal = _locked(path / "journal.jsonl")
        try:
            self._resume(json.loads(json.dumps(task)))
        except BaseException:
            os.close(self._journal)
            raise

    def _resume(self, task: dict[str, Any]) -> None:
        """Read the journal, hold it against `task` and cut off its torn end; begin it where there is none."""
        lines, end = _whole_lines(self._journal)
        os.truncate(self._journal, end)
        self.emptied = bool(lines) and not self.model.is_dir()
        if self.emptied or not lines or (len(lines) == 1 and lines[0] != task):  # nothing of it was made yet
            shutil.rmtree(self.model, ignore_errors=True)
            self.model.mkdir()
            os.truncate(self._journal, 0)
            self._append([task])
        elif lines[0] != task:
            raise _other_task(self.path, lines[0], task)
        else:
            self.done = {line["name"]: Done(**line) for line in lines[1:]}

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Make each shard that is missing in its full size: its header, and empty space for the tensors."""
        for shard in shards:
            handle = os.open(self.model / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(handle).st_size == shard.nbytes and os.pread(handle, len(shard.header), 0) == shard.header:
                    continue
                if any(name in shard.starts for done in self.done.values() for name in done.written):
                    what = f"{self.model / shard.file} is not as the conversion left it"
                    raise UserError(what, do=f"start over: {_over(self.path)}")
                os.truncate(handle, 0)
                os.pwrite(handle, shard.header, 0)
                os.truncate(handle, shard.nbytes)
                os.fsync(handle)
            finally:
                os.close(handle)
        sync(self.model)

    def write(self, file: str, start: int, data: memoryview) -> None:
        """Put bytes into a shard; any thread may."""
        handle = os.open(self.model / file, os.O_WRONLY)
        try:
            while data:
                written = os.pwrite(handle, data, start)
                data, start = data[written:], start + written
        finally:
            os.close(handle)
        with self._lock:
            self._dirty.add(file)

    def finish(self, done: Done, nbytes: int) -> None:
        """A tensor of `nbytes` is written whole. Its line in the journal follows once the disk has it."""
        self._waiting.append(done)
        self._waiting_bytes += nbytes
        if self._waiting_bytes >= SYNC_BYTES or time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait for the disk, then say in the journal what is on it."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for file in dirty:
            sync(self.model / file)  # should it fail, what was waiting is written again: a disk owns up only once
        self._append([asdict(done) for done in waiting])
        self.done |= {done.name: done for done in waiting}
        self._synced = time.monotonic()

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        before = os.fstat(self._journal).st_size
        data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        try:
            while data:
                data = data[os.write(self._journal, data) :]
        except OSError:  # a full disk may take half a line, and others would follow it
            os.truncate(self._journal, before)
            raise
        os.fdatasync(self._journal)

    def become(self, target: Path) -> None:
        """Move the finished model to `target`, replacing what was there, and clear up."""
        for file in self.model.iterdir():
            flush(file)
        sync(self.model)
        replaced = self.path / "replaced"
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            try:
                os.replace(target, replaced)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise UserError(
                    f"{target} cannot be replaced",
                    got=error.strerror or "",
                    why="a disk or a container's volume is mounted there",
                    do=f"move {self.model}, which is finished and audited, to where you want it",
                ) from error
        try:
            os.replace(self.model, target)  # killed before this line, the next call ends here as well
        except OSError:
            if replaced.exists():
                os.replace(replaced, target)
            raise
        sync(target.parent)
        self.remove()

    def remove(self) -> None:
        """All is done and the model stands elsewhere."""
        shutil.rmtree(self.path / "replaced", ignore_errors=True)  # before the journal, so that a kill leaves no rest
        shutil.rmtree(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Keep what was finished, also on Ctrl-C or a full disk; let go of the lock."""
        if self._waiting:
            with suppress(OSError):
                self.sync()
        os.close(self._journal)


def _locked(path: Path) -> int:
    """The journal, open for reading and appending, held by this process alone."""
    journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = path.exists() and os.path.samestat(os.fstat(journal), path.stat())
    except BlockingIOError:
        ours = False
    if not ours:  # locked, or removed by the one who had it locked a moment ago
        os.close(journal)
        raise UserError(
            f"Another process is writing {path.parent}",
            why="two at once would spoil each other's work",
            do="wait until it has finished, or stop it; its work can be continued",
        )
    return journal


def _whole_lines(journal: int) -> tuple[list[dict[str, Any]], int]:
    """The journal's lines up to the first that is not whole, and where that one begins."""
    lines: list[dict[str, Any]] = []
    end = 0
    for line in os.pread(journal, os.fstat(journal).st_size, 0).splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        end += len(line)
    return lines, end


def _other_task(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> UserError:
    keys = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    return UserError(
        f"{path} holds the beginning of another conversion",
        got="; ".join(f"{key} was {_short(old.get(key))}, now it is {_short(new.get(key))}" for key in sorted(keys)),
        why="the two cannot be mixed",
        do=f"finish that one with its own command, or start over: {_over(path)}",
    )


def _over(path: Path) -> str:
    before = path / "replaced"  # a call was killed while it put the new model into the old one's place
    rescue = f"move {before} away, the checkpoint that stood here before, then " if before.exists() else ""
    return f"{rescue}delete that folder (rm -r {shlex.quote(str(path))}) and give the command again"


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]
