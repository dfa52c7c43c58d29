"""Files as they were before they were compressed: gzip, bzip2, xz, and zstandard where its package is installed."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from cavelight.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BUFFER_BYTES = 1 << 20


@contextmanager
def open_stored(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """What `path` holds, unpacked, and the file as it is stored. A broken archive raises UserError."""
    try:
        with open(path, "rb") as stored, _unpacked(path, stored) as handle:
            yield handle, stored
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(
            f"{path} cannot be read", got=error.strerror or "", do="change its permissions or leave it out"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if path.suffix not in COMPRESSED:
            raise
        raise UserError(
            f"{path} is a broken archive", got=str(error), do="fetch or pack it again, or leave it out"
        ) from error


def optional(module: str, extra: str, path: Path) -> Any:
    """A module that only files like `path` need. Raises UserError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(
            f"{path} needs the package {package}, which is not installed", do=f'pip install "cavelight[{extra}]"'
        ) from error


def _unpacked(path: Path, stored: BinaryIO) -> BinaryIO:
    match path.suffix:
        case ".gz":
            return cast(BinaryIO, gzip.open(stored))
        case ".bz2":
            return cast(BinaryIO, bz2.open(stored))
        case ".xz":
            return cast(BinaryIO, lzma.open(stored))
        case ".zst":
            return io.BufferedReader(_Zstandard(stored, optional("zstandard", "zstd", path)), BUFFER_BYTES)
    return stored


class _Zstandard(io.RawIOBase):
    """All frames of a file. The package's own reader ends without a word where a file was cut off."""

    def __init__(self, stored: BinaryIO, zstandard: Any) -> None:
        self._stored, self._package = stored, zstandard
        self._frame: Any = None
        self._ready, self._left = b"", b""  # unpacked; and packed, of the next frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._left or self._stored.read(1 << 14)
            if not packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._package.ZstdDecompressor().decompressobj()
            try:
                self._ready, self._left = self._frame.decompress(packed), b""
            except self._package.ZstdError as error:
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)
