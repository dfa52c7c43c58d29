"""Saves of a run: complete or not at all, verified when read, written while training goes on.

A save is a folder step-00000500 with safetensors files, state.json for what is no tensor, and checksums.json.
"""

import json
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavelight.disk import folder_beside
from cavelight.errors import UserError
from cavelight.weights.files import Entry, bytes_of, layout
from cavelight.weights.headers import read_header

VALUES, CHECKSUMS = "state.json", "checksums.json"
PIECE = 1 << 20  # bytes read at a time
HALF_DONE = re.compile(r"\.(.+)\.\d+\.(part|old)")  # the names that cavelight.disk gives, and `prune`


@dataclass(frozen=True)
class Snapshot:
    """A run after `step` steps: tensors by file and name, and `values` that JSON can hold."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]


class DamagedError(Exception):
    """A save that is not as it was written."""


def folder_of(saves: Path, step: int) -> Path:
    return saves / f"step-{step:08d}"


def saved_steps(saves: Path) -> list[int]:
    """The steps of all saves in the folder, in order."""
    names = (re.fullmatch(r"step-(\d+)", folder.name) for folder in saves.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def write_save(saves: Path, snapshot: Snapshot) -> None:
    """Write a save; it stands there when its last byte is on the disk, or not at all. UserError for a full disk."""
    with folder_beside(folder_of(saves, snapshot.step)) as scratch:
        checksums = {}
        for name, tensors in snapshot.tensors.items():
            checksums[f"{name}.safetensors"] = _write_tensors(scratch / f"{name}.safetensors", tensors)
        values = json.dumps({"step": snapshot.step, **snapshot.values}, separators=(",", ":")).encode()
        (scratch / VALUES).write_bytes(values)
        checksums[VALUES] = zlib.crc32(values)
        (scratch / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")


def read_save(folder: Path) -> Snapshot:
    """Raises DamagedError if a file is missing or differs from what was written in as much as a bit."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_bytes())
        if VALUES not in checksums:
            raise DamagedError(f"{CHECKSUMS} is empty")
        for name, checksum in checksums.items():
            if (found := _checksum(folder / name)) != checksum:
                raise DamagedError(f"{name} has the checksum {found:08x}, not {checksum:08x}")
        values = json.loads((folder / VALUES).read_bytes())
        files = [name.removesuffix(".safetensors") for name in checksums if name != VALUES]
        tensors = {name: _read_tensors(folder / f"{name}.safetensors") for name in files}
        return Snapshot(values.pop("step"), tensors, values)
    except FileNotFoundError as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise DamagedError(str(error)) from error


def read_newest(saves: Path, say: Callable[[str], None]) -> Snapshot | None:
    """The newest save that is whole, or None where there is none at all; a damaged one is told to `say`."""
    steps = saved_steps(saves)
    for step in reversed(steps):
        folder = folder_of(saves, step)
        try:
            return read_save(folder)
        except DamagedError as error:
            say(f"{folder} is damaged ({error}): going on from the save before it")
    if steps:
        raise UserError(
            f"No save in {saves} is whole", got=f"{len(steps)} damaged", do="delete the run's folder and start it anew"
        )
    return None


def prune(saves: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Remove all but the `keep` newest saves up to `step` and those at multiples of `keep_every` steps.

    Saves beyond `step` go too: they were damaged, and the run has come past them by another way.
    """
    steps = saved_steps(saves)
    until = [other for other in steps if other <= step]
    stays = {*until[-keep:], *(other for other in until if keep_every and other % keep_every == 0)}
    for other in set(steps) - stays:
        folder = folder_of(saves, other)
        # By another name: a kill while it is being emptied leaves nothing to be read.
        gone = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        os.replace(folder, gone)
        shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written; anybody else's files stay, whatever ends in .part or .old."""
    for rest in list(folder.glob(".*")):
        name = HALF_DONE.fullmatch(rest.name)
        if not name:
            continue
        if name[2] == "old" and not (folder / name[1]).exists():
            os.replace(rest, folder / name[1])  # folder_beside had moved it away for a new one, which did not come
        elif rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink()


class Saver:
    """Does one piece of writing at a time in a thread of its own, which ends with the process."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: UserError | bool = False

    def begin(self, write: Callable[[], None]) -> None:
        """Start writing. What was begun before has to be collected."""
        assert self._thread is None, "one at a time"

        def work() -> None:
            try:
                write()
                self._outcome = True
            except UserError as error:
                self._outcome = error

        self._outcome = False
        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()

    def collect(self, wait: bool) -> bool:
        """Whether something is newly written; raises the UserError that kept it from being so."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return False
        self._thread.join()
        self._thread = None
        if isinstance(self._outcome, UserError):
            raise self._outcome
        if not self._outcome:
            raise RuntimeError("writing failed: the thread's own traceback says why")
        return True


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """One safetensors file; its crc32."""
    # The library's writer loses the error number of a full disk.
    (shard,) = layout([Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()], sys.maxsize)
    checksum = zlib.crc32(shard.header)
    with open(path, "wb") as handle:
        handle.write(shard.header)
        for name in shard.starts:
            data = bytes_of(tensors[name])
            checksum = zlib.crc32(data, checksum)
            handle.write(data)
    return checksum


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All of a file, in memory of its own: the optimizer keeps what it is given, and the file may be pruned."""
    tensors = {}
    with open(path, "rb") as handle:
        for entry in read_header(path):
            tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
            handle.seek(entry.start)
            handle.readinto(bytes_of(tensors[entry.name]))
    return tensors


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as handle:
        while piece := handle.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum
