"""Safetensors on disk: one file, or shards with an index as Hugging Face lays them out.

A file is eight bytes with the header's length, a header in JSON with each tensor's dtype, shape and place, and the
tensors' bytes. On reading, every header is held against its file's size before anything is mapped, since touching a
mapped page past a file's end kills the process.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cavelight.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 100 * 10**6  # the format allows no more
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
DOWNLOAD_AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path, entries: Sequence[Entry], tensor: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `entries` into `folder`, as one file or as shards of at most `shard_bytes` of tensors and their index.

    `tensor` is asked for each one when its turn comes, so no more than one has to exist at a time. A tensor larger
    than `shard_bytes` gets a shard of its own.
    """
    shards = _plan(entries, shard_bytes)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_shard(folder / file, shard, tensor)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_shard(file: Path, shard: Sequence[Entry], tensor: Callable[[str], Tensor]) -> None:
    # The library's writer wants the whole shard in memory and loses the errno of a full disk, so this one streams.
    shard = sorted(shard, key=lambda entry: -entry.dtype.itemsize)  # wide ones first keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in shard:
            value = tensor(entry.name).detach()
            assert (tuple(value.shape), value.dtype) == (entry.shape, entry.dtype), entry.name
            handle.write(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


class Safetensors:
    """The tensors of a checkpoint folder: all headers are read and checked at once, the tensors when asked for.

    `entries` maps names to what the headers say. Raises UserError for whatever is missing, cut short, doubled or
    contradictory, and for dtypes other than bfloat16, float16 and float32.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        index = _read_index(folder)
        for file in [folder / SINGLE] if index is None else sorted({folder / name for name in index.values()}):
            for entry in _read_header(file):
                if entry.name in self._files:
                    raise UserError(
                        f"{entry.name} is stored twice in {folder}",
                        got=f"{self._files[entry.name].name} and {file.name}",
                        why="which of the two is meant cannot be known",
                        do=DOWNLOAD_AGAIN,
                    )
                self.entries[entry.name] = entry
                self._files[entry.name] = file
        if index is not None:
            self._check_index(folder, index)

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped rather than read: its pages come from disk when touched."""
        file = self._files[name]
        with _reading(file):
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def _check_index(self, folder: Path, index: dict[str, str]) -> None:
        wrong = [f"{name} is not in {file}" for name, file in index.items() if self._files.get(name) != folder / file]
        wrong += [f"{file.name} holds {name} besides" for name, file in self._files.items() if name not in index]
        if wrong:
            raise UserError(
                f"{folder / INDEX} does not fit its shards",
                got=abbreviated(wrong),
                do="download the index and the shards again, all from the same place",
            )


def _read_index(folder: Path) -> dict[str, str] | None:
    """Which file each tensor is in, or None where there is no index but one file for all."""
    path = folder / INDEX
    if not path.is_file():
        if not (folder / SINGLE).is_file():
            shards = sorted(file.name for file in folder.glob("*.safetensors"))
            raise UserError(
                f"{folder} holds no weights that can be read",
                got=f"shards without {INDEX}: {', '.join(shards[:3])}" if shards else "no file *.safetensors",
                why=f"weights are expected in {SINGLE}, or in shards that {INDEX} lists",
                do="complete the download; weights in PyTorch's .bin or .pt format have to be converted first",
            )
        return None
    with _reading(path):
        index = _parse(path.read_bytes(), path)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} has no weight_map", got=f"keys {', '.join(index) or 'none'}", do=DOWNLOAD_AGAIN)
    for file in files.values():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise UserError(
                f"{path} names a shard outside its folder",
                got=repr(file),
                why="shards lie beside their index; anything else is a mistake or an attack",
                do="do not trust this checkpoint; fetch it from its publisher",
            )
    if SINGLE not in files.values() and (folder / SINGLE).is_file():
        raise UserError(
            f"{folder} holds two sets of weights",
            got=f"{SINGLE}, and {INDEX} with other files",
            why="which of the two is meant cannot be known",
            do="move one of them away",
        )
    return files


def _read_header(file: Path) -> list[Entry]:
    """What the file says of its tensors, once that is known to fit the file's size."""
    if not file.is_file():
        raise UserError(f"The shard {file.name} is missing in {file.parent}", do="complete the download")
    with _reading(file), open(file, "rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(0)
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start == b"version ":
            raise UserError(
                f"{file} is a pointer of Git LFS, not the weights themselves", do="fetch them with `git lfs pull`"
            )
        if len(start) < 8 or length > HEADER_BYTES:
            raise UserError(
                f"{file} is not a safetensors file",
                got=f"{size} bytes" if len(start) < 8 else f"a header of {length:,} bytes",
                why=f"it would begin with the length of a header of at most {HEADER_BYTES:,} bytes",
                do=DOWNLOAD_AGAIN,
            )
        if size < 8 + length:
            raise _cut_short(file, size, 8 + length)
        header = _parse(handle.read(length), file)
    header.pop("__metadata__", None)
    entries, end = [], 0
    for name, described in header.items():
        entry, entry_end = _entry(file, name, described)
        entries.append(entry)
        end = max(end, entry_end)
    if size < 8 + length + end:
        raise _cut_short(file, size, 8 + length + end)
    return entries


def _entry(file: Path, name: str, described: Any) -> tuple[Entry, int]:
    """One line of a header, and where its tensor ends, counted from the first tensor's start."""
    match described:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(start), int(end)]} if all(
            isinstance(length, int) and length >= 0 for length in shape
        ):
            _check_dtype(file, name, code)
            entry = Entry(name, tuple(shape), DTYPES[code])
            if start >= 0 and start + entry.nbytes == end:
                return entry, end
    raise UserError(f"The header of {file} makes no sense", got=f"{name}: {described!r:.200}", do=DOWNLOAD_AGAIN)


def _check_dtype(file: Path, name: str, code: str) -> None:
    if code.startswith("F8_"):
        raise UserError(
            f"{file.parent} holds block-fp8 weights, which Cavelight cannot read yet",
            got=f"{name} is {code}",
            do="convert them to bfloat16 first, for example with fp8_cast_bf16.py from DeepSeek-V3's repository",
        )
    if code not in DTYPES:
        raise UserError(
            f"{name} in {file} is of a dtype that Cavelight cannot read",
            got=code,
            why=f"a model's weights are {', '.join(DTYPES)}",
            do="take the checkpoint in bfloat16, not a quantised one",
        )


def _cut_short(file: Path, size: int, announced: int) -> UserError:
    return UserError(
        f"{file} is cut short",
        got=f"{size:,} of {announced:,} bytes",
        why="the download or copy was interrupted",
        do=DOWNLOAD_AGAIN,
    )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read", got=str(error), do=DOWNLOAD_AGAIN) from error


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object in which no key occurs twice."""

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            raise ValueError("a key occurs twice")
        return parsed

    try:
        parsed = json.loads(text, object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} holds broken JSON", got=str(error), do=DOWNLOAD_AGAIN) from error
    if not isinstance(parsed, dict):
        raise UserError(f"{file} holds JSON that is no object", got=type(parsed).__name__, do=DOWNLOAD_AGAIN)
    return parsed


def abbreviated(names: Sequence[str], most: int = 10) -> str:
    """A list for an error message: the first few, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
