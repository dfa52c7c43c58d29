"""Files appear under their final name only when complete: written beside, flushed, renamed.

A full disk, Ctrl-C or a crash leaves whatever stood there before as it was.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cavelight.errors import UserError

UNWRITABLE = {
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.EBUSY),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    errno.ENOTEMPTY,  # another process has just put a folder of its own there
}


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Yield a scratch path next to `path`; on success it is flushed and becomes `path`."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
            flush(scratch)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a scratch folder next to `path`; on success it becomes `path`, replacing what was there."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            yield scratch
            for file in scratch.rglob("*"):
                if file.is_file():
                    flush(file)
            if path.exists():
                os.replace(path, old)
            os.replace(scratch, path)  # between these two lines, and nowhere else, a SIGKILL leaves only `old`
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            shutil.rmtree(scratch, ignore_errors=True)


def cache_folder() -> Path:
    """Where tokenizers, token stores and built kernels are kept: $CAVELIGHT_CACHE, or the user's cache folder."""
    chosen = os.environ.get("CAVELIGHT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cavelight"


def checkpoint_folder(path: str | Path) -> Path:
    """The folder that holds the checkpoint: `path` itself, or `path`/model where `path` is a run's folder."""
    folder = Path(path)
    inside = folder / "model"
    return inside if (inside / "config.json").is_file() and not (folder / "config.json").exists() else folder


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a log, one a line; none where there is no log. A last line that is not ended is left out.

    It is still being written, or was cut off. Raises UserError for any other line that is damaged.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(json.loads(line))
            if not isinstance(found[-1], dict):
                raise ValueError(f"a {type(found[-1]).__name__}, not an object")
        except ValueError as error:
            do = "put the line right, or take it out"
            raise UserError(f"{path}:{number} is damaged", got=str(error), do=do) from error
    return found


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written, while writing `path`, as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"The disk is full while writing {path}"
                if error.errno != errno.EFBIG
                else f"{path} is too large for this disk",
                why="nothing was overwritten; what stood there before is unchanged",
                do="free some space or choose another folder, then run the same command again",
            ) from error
        if error.errno in UNWRITABLE:
            raise UserError(
                f"{path} cannot be written", got=error.strerror or "", do="choose another folder, one you may write to"
            ) from error
        raise


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Wait until the disk has a finished file, then forget it."""
    sync(path)
    forget(path)


def forget(path: Path) -> None:
    """Let the system give up what it holds of a file that is on the disk.

    It keeps what was written in small pages, and what is mapped anew in huge ones, over which weights are read up to a
    tenth faster.
    """
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as handle, suppress(OSError):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
