"""A corpus as token ids on disk: read as it lies, written so that a kill at any instant loses little.

Letters: N tokens of the store, M documents. A store is a folder of three arrays: `tokens.bin` [N] (uint16 or uint32),
`starts.bin` [M + 1] and `bytes.bin` [M] (int64), all little-endian, and `meta.json` with a checksum of every piece
of them. While it is written it has another name and a journal instead: a line for each piece that is safe on the disk.
"""

import fcntl
import json
import logging
import os
import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cavelight.data.encode import Encoded
from cavelight.data.read import Place
from cavelight.disk import clear_disk_errors

PIECE_BYTES = 16 << 20  # of tokens: what is lost by a kill at most, and checked by one checksum
DOCUMENTS_AT_ONCE = 1 << 12  # when stores are joined
CHECKED_BYTES = 256 << 20  # of a store when it is opened; a larger one is checked in part, at another place each time

Int64 = NDArray[np.int64]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStore:
    """The tokens of one part of a corpus: each document is the beginning token, its text, the end token.

    The arrays stay on disk. Document m is tokens_N[starts_M1[m] : starts_M1[m + 1]], and its text has bytes_M[m] bytes
    in UTF-8. `checksums` are those of its pieces, as they were written.
    """

    tokens_N: NDArray[Any]
    starts_M1: Int64
    bytes_M: Int64
    checksums: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens_N)

    @classmethod
    def read(cls, folder: Path, key: str, checked_bytes: int | None = CHECKED_BYTES) -> "TokenStore | None":
        """The store in `folder`, or None when it is absent or belongs to another `key`.

        Sizes are held against meta.json, and the checksums of pieces chosen at random, of `checked_bytes` together, or
        of all for None. Raises ValueError if anything differs or is missing.
        """
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["key"] != key:
                return None
            pieces, dtype = [Piece(**piece) for piece in meta["pieces"]], np.dtype(meta["dtype"])
            _check(folder, dtype, pieces, checked_bytes)
        except FileNotFoundError as error:
            if folder.exists():
                raise ValueError(f"{Path(error.filename).name} is missing") from error
            return None
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"meta.json is broken: {error!r}") from error
        tokens, documents = pieces[-1].tokens, pieces[-1].documents
        return cls(
            np.memmap(folder / "tokens.bin", dtype, "r", shape=(tokens,)),
            np.memmap(folder / "starts.bin", np.int64, "r", shape=(documents + 1,)),
            np.memmap(folder / "bytes.bin", np.int64, "r", shape=(documents,)),
            tuple(checksum for piece in pieces for checksum in piece.checksums),
        )


@dataclass(frozen=True)
class Piece:
    """What stands in the store after this piece, where the corpus is to be read on, and the piece's checksums.

    `checksums` are crc32 of what it added to tokens.bin, starts.bin and bytes.bin.
    """

    tokens: int
    documents: int
    text_bytes: int
    after: Sequence[int]
    checksums: Sequence[int]


@dataclass
class _File:
    handle: BinaryIO
    checksum: int = 0

    def append(self, data: memoryview) -> None:
        self.handle.write(data)
        self.checksum = zlib.crc32(data, self.checksum)


@dataclass
class StoreWriter:
    """The unfinished store in `folder`: documents are appended, and every PIECE_BYTES of tokens are made safe.

    `place` is where the corpus is to be read on; what a killed call had written after its last piece is gone.
    """

    folder: Path
    dtype: np.dtype[Any]
    pieces: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pieces = _journaled(self.folder, self.dtype)
        last = self.pieces[-1] if self.pieces else Piece(0, 0, 0, Place(), ())
        self.place = Place(*last.after)
        self.tokens, self.documents, self.text_bytes = last.tokens, last.documents, last.text_bytes
        self._files = [self._opened(name, size) for name, size in _sizes(last, self.dtype).items()]

    def append(self, encoded: Encoded, after: Place) -> None:
        ends = self.tokens + np.cumsum(encoded.lengths_M)
        arrays = (encoded.tokens_N.astype(self.dtype, copy=False), ends, encoded.bytes_M)
        for file, array in zip(self._files, arrays, strict=True):
            file.append(array.data.cast("B") if len(array) else memoryview(b""))
        self.tokens += len(encoded.tokens_N)
        self.documents += len(encoded.lengths_M)
        self.text_bytes += int(encoded.bytes_M.sum())
        self.place = after
        safe = self.pieces[-1].tokens if self.pieces else 0
        if (self.tokens - safe) * self.dtype.itemsize >= PIECE_BYTES:
            self.commit()

    def commit(self) -> None:
        """Wait for the disk, then say in the journal what is on it."""
        for file in self._files:
            file.handle.flush()
            os.fsync(file.handle.fileno())
        checksums = [file.checksum for file in self._files]
        piece = Piece(self.tokens, self.documents, self.text_bytes, self.place, checksums)
        with open(self.folder / "journal.jsonl", "ab") as journal:
            journal.write(json.dumps(vars(piece)).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.pieces.append(piece)
        for file in self._files:
            file.checksum = 0

    def finish(self, final: Path, key: str) -> None:
        """The unfinished folder becomes `final`."""
        if not self.pieces or self.tokens > self.pieces[-1].tokens:
            self.commit()
        meta = {"key": key, "dtype": self.dtype.str, "pieces": [vars(piece) for piece in self.pieces]}
        with open(self.folder / "meta.json", "w", encoding="utf-8") as handle:
            json.dump(meta, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        (self.folder / "journal.jsonl").unlink()
        os.replace(self.folder, final)

    def close(self) -> None:
        for file in self._files:
            file.handle.close()

    def _opened(self, name: str, size: int) -> _File:
        path = self.folder / name
        handle = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115  (open as long as the writer is)
        handle.truncate(size)  # in a new starts.bin this makes the 0 at which the first document starts
        handle.seek(size)
        return _File(handle, 0 if self.pieces else zlib.crc32(bytes(size)))


@contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """The folder in which `final` is being made, for this process alone; waits while another one is at work there."""
    folder = final.with_name(f"{final.name}.unfinished")
    with clear_disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(final.with_name(f".{final.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("Another process is making %s: waiting for it.", final)
                fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(exist_ok=True)
            yield folder
        finally:
            os.close(lock)


def join(stores: Sequence[TokenStore], writer: StoreWriter) -> None:
    """Append the documents of all `stores`, one after another, but for those that a killed call has appended."""
    done = writer.documents
    for store in stores:
        starts_M1, begin = np.asarray(store.starts_M1), min(done, len(store.bytes_M))
        done -= begin
        for first in range(begin, len(store.bytes_M), DOCUMENTS_AT_ONCE):
            last = min(first + DOCUMENTS_AT_ONCE, len(store.bytes_M))
            tokens_N = store.tokens_N[starts_M1[first] : starts_M1[last]]
            lengths_M = np.diff(starts_M1[first : last + 1])
            writer.append(Encoded(np.asarray(tokens_N), lengths_M, np.asarray(store.bytes_M[first:last])), Place())


def _check(folder: Path, dtype: np.dtype[Any], pieces: list[Piece], checked_bytes: int | None) -> None:
    for name, size in _sizes(pieces[-1], dtype).items():
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{name} has {(folder / name).stat().st_size} bytes, not {size}")
    numbers = list(range(len(pieces)))
    if checked_bytes is not None:
        share = max(1, checked_bytes // PIECE_BYTES)
        numbers = sorted(random.sample(numbers, min(share, len(numbers))))
    for number in numbers:
        after = _sizes(pieces[number], dtype)
        before = _sizes(pieces[number - 1], dtype) if number else dict.fromkeys(after, 0)
        for (name, start), checksum in zip(before.items(), pieces[number].checksums, strict=True):
            if _checksum(folder / name, start, after[name]) != checksum:
                raise ValueError(f"a checksum of {name} differs")


def _sizes(piece: Piece, dtype: np.dtype[Any]) -> dict[str, int]:
    """Bytes of each file up to the end of a piece."""
    return {
        "tokens.bin": piece.tokens * dtype.itemsize,
        "starts.bin": 8 * (piece.documents + 1),
        "bytes.bin": 8 * piece.documents,
    }


def _checksum(path: Path, start: int, stop: int) -> int:
    checksum = 0
    with open(path, "rb") as handle:
        handle.seek(start)
        while block := handle.read(min(1 << 20, stop - handle.tell())):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _journaled(folder: Path, dtype: np.dtype[Any]) -> list[Piece]:
    """The pieces that a journal tells of, if it can be read and their bytes are there; a torn last line is dropped."""
    journal = folder / "journal.jsonl"
    if not journal.exists():
        return []
    whole = [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        pieces = [Piece(**json.loads(line)) for line in whole]
    except (ValueError, TypeError):
        whole, pieces = [], []
    sizes = _sizes(pieces[-1], dtype) if pieces else {}
    if any(not (folder / name).exists() or (folder / name).stat().st_size < size for name, size in sizes.items()):
        whole, pieces = [], []
    os.truncate(journal, sum(map(len, whole)))
    return pieces
