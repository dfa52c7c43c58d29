"""What a checkpoint's files say that they hold: the index, and the header of every shard.

A safetensors file is eight bytes with the header's length, a header in JSON with each tensor's dtype, shape and place,
and the tensors' bytes. Nothing in it is believed that the file's size does not bear out, and nothing is read by a
header that is not sound as a whole: names, shapes and dtypes, tensors side by side from the first byte to the last.
"""

import errno
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cavelight.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_BYTES = 100 * 10**6  # the format allows no more
PARSED_BYTES = 2**28  # JSON that would take more memory is an attack: a full-size V3's takes a fifth of it
NAME_LENGTH = 300  # characters; released names have up to 70
MOST_AXES = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# How files begin that are called *.safetensors and are something else.
STRANGERS = (
    (b"version ", "a pointer of Git LFS", "fetch the weights themselves with `git lfs pull`"),
    (b"PK\x03\x04", "a zip, as PyTorch writes them", ""),
    (b"\x80", "a pickle, as PyTorch wrote them", ""),
    (b"GGUF", "a GGUF file", "take the checkpoint in Hugging Face's format"),
    (b"<", "a page of HTML or XML, most likely a server's error message", ""),
    (b"{", "JSON without the length that goes before it, or a server's error message", ""),
    (bytes(8), "empty space that was reserved and never written", ""),
)
DOWNLOAD_AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of one tensor, and where it lies: `start` is its first byte in `file`.

    `stamp` is the file's when its header was read, see `stamp_of`; empty for what is yet to be written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path = Path()
    start: int = 0
    stamp: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Index:
    """A model.safetensors.index.json: which file holds each tensor, and what else it says of them.

    `metadata["total_size"]` is not held against the tensors: nothing is read by it, and publishers get it wrong.
    """

    files: dict[str, str]
    metadata: dict[str, Any]


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by name, from the headers alone.

    Raises UserError for whatever is missing, cut short, doubled, contradictory, not safetensors or of unknown dtype.
    """
    if not os.path.isdir(folder):  # unlike pathlib's, it never raises
        raise UserError(
            f"There is no folder {folder}", why="a checkpoint is a folder with config.json and *.safetensors"
        )
    index = read_index(folder)
    entries: dict[str, Entry] = {}
    for name in [SINGLE] if index is None else sorted(set(index.files.values())):
        for entry in read_header(folder / name):
            if entry.name in entries:
                raise UserError(
                    f"{entry.name} is stored twice in {folder}",
                    got=f"{entries[entry.name].file.name} and {name}",
                    why="which of the two is meant cannot be known",
                    do=DOWNLOAD_AGAIN,
                )
            entries[entry.name] = entry
    if index is not None:
        _check_index(folder, index, entries)
    return entries


def read_index(folder: Path) -> Index | None:
    """A folder's index, or None where there is none but one file for all. Whether it fits is for read_headers."""
    path = folder / INDEX
    if not os.path.lexists(path):
        if not os.path.lexists(folder / SINGLE):
            shards = sorted(file.name for file in folder.glob("*.safetensors"))
            raise UserError(
                f"{folder} holds no weights that can be read",
                got=f"shards without {INDEX}: {abbreviated(shards, 3)}" if shards else "no file *.safetensors",
                why=f"weights are expected in {SINGLE}, or in shards that {INDEX} lists",
                do="complete the download; weights in PyTorch's .bin or .pt format have to be converted first",
            )
        return None
    with opened(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > HEADER_BYTES:
            raise UserError(f"{path} is too large for an index", got=f"{size:,} bytes", do=DOWNLOAD_AGAIN)
        index = _parse(handle.read(size), path)
    files, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} has no weight_map", got=f"keys {abbreviated([*index]) or 'none'}", do=DOWNLOAD_AGAIN)
    if not isinstance(metadata, dict):
        raise UserError(f"{path} makes no sense", got=f"metadata: {reprlib.repr(metadata)}", do=DOWNLOAD_AGAIN)
    for file in set(map(_checked_file, files.values())) - {None}:
        raise UserError(
            f"{path} names a shard outside its folder",
            got=file or "",
            why="shards lie beside their index; anything else is a mistake or an attack",
            do="do not trust this checkpoint; fetch it from its publisher",
        )
    if SINGLE not in files.values() and os.path.lexists(folder / SINGLE):
        raise UserError(
            f"{folder} holds two sets of weights",
            got=f"{SINGLE}, and {INDEX} with other files",
            why="which of the two is meant cannot be known",
            do="move one of them away",
        )
    return Index(files, metadata)


def read_header(file: Path) -> list[Entry]:
    """What one file says of its tensors, in the order in which they lie, once that is known to fit the file's size."""
    with opened(file) as handle:
        stamp, size = stamp_of(handle), os.fstat(handle.fileno()).st_size
        start = handle.read(16)
        length = int.from_bytes(start[:8], "little")
        if len(start) <= 8 or start[8:9] != b"{" or length > HEADER_BYTES:
            raise _not_safetensors(file, size, start)
        if size < 8 + length:
            raise cut_short(file, size, 8 + length)
        handle.seek(8)
        header = _parse(handle.read(length), file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _senseless(file, "__metadata__", metadata)
    entries = [_entry(file, stamp, 8 + length, name, described) for name, described in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_extents(file, entries, 8 + length, size)
    return entries


def _entry(file: Path, stamp: tuple[int, ...], data: int, name: str, described: object) -> Entry:
    """One line of a header, for a file whose tensors begin at byte `data`."""
    if not 0 < len(name) <= NAME_LENGTH or not name.isprintable():
        raise UserError(
            f"The header of {file} holds a name that no tensor bears",
            got=f"{reprlib.repr(name)}, {len(name):,} characters",
            do="do not trust this checkpoint; fetch it from its publisher",
        )
    match described:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [start, end], **rest} if (
            not rest and len(shape) <= MOST_AXES and all(map(_is_count, (*shape, start, end)))
        ):
            if code not in DTYPES:
                raise UserError(
                    f"{name} in {file} is of a dtype that Cavelight cannot read",
                    got=reprlib.repr(code),
                    why=f"a checkpoint's tensors are {', '.join(DTYPES)}",
                    do="take the checkpoint in bfloat16 or block-fp8",
                )
            entry = Entry(name, tuple(shape), DTYPES[code], file, data + start, stamp)
            # Torch computes strides of empty tensors too, in 64 bits.
            if start + entry.nbytes == end and math.prod(max(1, n) for n in shape) * entry.dtype.itemsize < 2**63:
                return entry
    raise _senseless(file, name, described)


def _check_extents(file: Path, entries: Sequence[Entry], data: int, size: int) -> None:
    """Tensors, sorted by place, have to cover everything behind the header, each byte once."""
    end = max((entry.start + entry.nbytes for entry in entries), default=data)
    if size < end:
        raise cut_short(file, size, end)
    at, before = data, "the header"
    for entry in entries:
        if entry.start != at:
            raise UserError(
                f"Tensors of {file} do not lie side by side",
                got=f"{abs(entry.start - at):,} bytes {'between' if entry.start > at else 'shared by'} "
                f"{before} and {entry.name}",
                why="the format allows neither gaps nor overlaps, which could hide anything",
                do=DOWNLOAD_AGAIN,
            )
        at, before = at + entry.nbytes, entry.name
    if size > end:
        raise UserError(
            f"{file} goes on after its last tensor",
            got=f"{size - end:,} bytes more",
            why="they belong to something that its header does not mention",
            do=DOWNLOAD_AGAIN,
        )


def _check_index(folder: Path, index: Index, entries: dict[str, Entry]) -> None:
    in_headers = {name: entry.file.name for name, entry in entries.items()}
    if index.files == in_headers:
        return
    wrong = [f"{name} is not in {file}" for name, file in index.files.items() if in_headers.get(name) != file]
    wrong += [f"{file} holds {name} besides" for name, file in in_headers.items() if name not in index.files]
    raise UserError(
        f"{folder / INDEX} does not fit its shards",
        got=abbreviated(wrong),
        do="download the index and the shards again, all from the same place",
    )


def _checked_file(file: object) -> str | None:
    """None for the name of a file in the index's folder, and how to print it for anything else."""
    if isinstance(file, str) and file.isprintable() and file not in ("", ".", "..") and not set(file) & {"/", "\\"}:
        return None
    return reprlib.repr(file)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # not isinstance: True is an int


def stamp_of(handle: BinaryIO) -> tuple[int, ...]:
    """What is no longer the same once another file bears the name, or this one was written to.

    The system's number of a file is not enough: a file that is made after another was deleted often gets the same.
    """
    found = os.fstat(handle.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A regular file to read from, through symlinks. UserError for anything else, and for what fails while reading."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for its writer
            raise UserError(
                f"{file} is not a file", got="a folder" if file.is_dir() else "a pipe or device", do=DOWNLOAD_AGAIN
            )
        with open(file, "rb") as handle:
            yield handle
    except FileNotFoundError as error:
        raise UserError(
            f"The shard {file.name} is missing in {file.parent}"
            if file.suffix == ".safetensors"
            else f"{file.name} is missing in {file.parent}",
            got=f"a symlink to {os.readlink(file)}, where nothing is" if file.is_symlink() else "",
            do="complete the download",
        ) from error
    except OSError as error:
        do = "ask for permission to read it" if isinstance(error, PermissionError) else DOWNLOAD_AGAIN
        if error.errno in (errno.EMFILE, errno.ENFILE):
            do = "let this process hold more files open (ulimit -n); each file that is mapped is one"
        raise UserError(f"{file} cannot be read", got=error.strerror or str(error), do=do) from error


def cut_short(file: Path, size: int, announced: int) -> UserError:
    """The error for a file that has `size` bytes of those its header announced."""
    return UserError(
        f"{file} is cut short",
        got=f"{size:,} of {announced:,} bytes",
        why="the download or copy was interrupted",
        do=DOWNLOAD_AGAIN,
    )


def _not_safetensors(file: Path, size: int, start: bytes) -> UserError:
    length = int.from_bytes(start[:8], "little")
    impossible = len(start) > 8 and not 0 < length <= HEADER_BYTES
    for beginning, kind, do in STRANGERS if impossible else ():
        if start.startswith(beginning):
            return UserError(
                f"{file} is not a safetensors file but {kind}",
                why="opening a pickle can run any program, so it is left alone" if "PyTorch" in kind else "",
                do=do or "fetch the checkpoint's *.safetensors again, from its publisher",
            )
    return UserError(
        f"{file} is not a safetensors file",
        got=f"a header of {length:,} bytes" if impossible else f"{size:,} bytes that begin with {start!r}",
        why=f"it would begin with the length of a header of at most {HEADER_BYTES:,} bytes, and the header with {{",
        do=DOWNLOAD_AGAIN,
    )


def _senseless(file: Path, name: str, described: object) -> UserError:
    got = f"{name}: {reprlib.repr(described)}"
    return UserError(f"The header of {file} makes no sense", got=got, do=DOWNLOAD_AGAIN)


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object in which no key occurs twice, neither in itself nor in what is inside."""

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            raise ValueError("a key occurs twice")
        return parsed

    try:
        # Three characters, `[],`, become 64 bytes: 100 MB of them 2 GB.
        if len(text) + 64 * (text.count(b"[") + text.count(b"{")) + 32 * text.count(b'"') > PARSED_BYTES:
            raise ValueError(f"{len(text):,} bytes that would take over {PARSED_BYTES:,} of memory")
        parsed = json.loads(text.decode(), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} holds broken JSON", got=str(error), do=DOWNLOAD_AGAIN) from error
    if not isinstance(parsed, dict):
        raise UserError(f"{file} holds JSON that is no object", got=type(parsed).__name__, do=DOWNLOAD_AGAIN)
    return parsed


def abbreviated(names: Sequence[str], most: int = 10) -> str:
    """A list for an error message: the first few, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    shown = (name if name.isprintable() and len(name) < NAME_LENGTH else reprlib.repr(name) for name in names[:most])
    return ", ".join(shown) + more
