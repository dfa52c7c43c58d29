"""Files appear under their final name only when complete: written beside, flushed, renamed.

A full disk, Ctrl-C or a crash leaves whatever stood there before as it was.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cavelight.errors import UserError


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Yield a scratch path next to `path`; on success it is flushed and becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _clear_disk_errors(path):
        try:
            yield scratch
            _flush(scratch)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a scratch folder next to `path`; on success it becomes `path`, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with _clear_disk_errors(path):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            yield scratch
            for file in scratch.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                os.replace(path, old)
            os.replace(scratch, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _clear_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full while writing {path}",
                why="nothing was overwritten; what stood there before is unchanged",
                do="free some space or choose another folder, then run the same command again",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{path} cannot be written", got=error.strerror or "", do="choose a folder that you may write to"
            ) from error
        raise


def _flush(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
