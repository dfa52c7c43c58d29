"""Safetensors on disk: one file, or shards with an index as Hugging Face lays them out.

What headers say is checked in headers.py. Tensors are read into memory, or seen in their file's own pages.
"""

import json
import math
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.kernels.room import LARGE, in_huge_pages, zeros
from cavelight.weights.headers import (
    CODES,
    INDEX,
    SINGLE,
    Entry,
    abbreviated,
    cut_short,
    opened,
    read_headers,
    stamp_of,
)

__all__ = ["INDEX", "SINGLE", "Entry", "Safetensors", "Shard", "abbreviated", "index_of", "layout", "write_safetensors"]

SWITCH = "CAVELIGHT_MAPPED"  # 0: weights to run are read, not mapped
SHARD_BYTES = 4 * 2**30
EXPERT = re.compile(r"(.*\.experts)\.\d+(\.\w+)\..*")  # a tensor of one expert
# Nothing is set aside for pages that may be written, else a file larger than memory would be refused.
# Older Pythons have no name for that.
PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
PIECE = 2**26  # bytes read at a time: Ctrl-C is heard between two pieces


class Safetensors:
    """The tensors of a checkpoint folder: all headers are read and checked at once, the tensors when asked for.

    `entries` maps names to what the headers say. Raises UserError for whatever is missing, cut short, doubled or
    contradictory, when made or when read. May be shared between threads. Holds no file open but those
    that `mapped` maps.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = read_headers(folder)
        self._mappings: dict[Path, mmap.mmap | None] = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        entry = self.entries[name]
        return self._read(entry, 0, entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of the first axis, in memory of their own."""
        entry = self.entries[name]
        assert 0 <= start <= stop <= entry.shape[0], (name, entry.shape, start, stop)
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        return self._read(entry, start * row_bytes, (stop - start, *entry.shape[1:]))

    def mapped(self, names: Sequence[str]) -> Tensor | None:
        """Tensors of one shape as one, [number of names, *shape]: a view of their file.

        None where they do not lie one behind the other in one file, lie askew, are empty, or cannot be mapped. The file
        is never written to: who writes to the view gets pages of his own. It is the file that was opened, renamed or
        deleted as it may be; if it is cut short, touching what is gone ends the process.
        """
        first, *others = (self.entries[name] for name in names)
        for number, entry in enumerate(others, 1):
            follows = (entry.file, entry.start) == (first.file, first.start + number * first.nbytes)
            if not follows or (entry.dtype, entry.shape) != (first.dtype, first.shape):
                return None
        count, size = len(names) * first.size, first.dtype.itemsize
        mapping = None if not count or first.start % size else self._mapping(first)
        if mapping is None:
            return None
        # A tensor for itself, not a part of one for the whole file: who saves or copies one does not take all along.
        flat = torch.frombuffer(mapping, dtype=first.dtype, count=count, offset=first.start)
        return flat.view(len(names), *first.shape)

    def _mapping(self, entry: Entry) -> mmap.mmap | None:
        """The whole file of a tensor."""
        if entry.file not in self._mappings:
            with _opened(entry) as handle:
                try:
                    mapping = mmap.mmap(handle.fileno(), 0, PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
                    self._mappings[entry.file] = in_huge_pages(mapping)
                except (OSError, ValueError):  # its file system cannot, or it is empty by now, which reading tells
                    self._mappings[entry.file] = None
        return self._mappings[entry.file]

    def _read(self, entry: Entry, skipped: int, shape: tuple[int, ...]) -> Tensor:
        """`shape` elements of a tensor, from the byte after the `skipped` ones on."""
        tensor = empty(shape, entry.dtype, entry.name)
        into = bytes_of(tensor)
        with _opened(entry) as handle:
            done = 0
            while done < len(into):
                at = entry.start + skipped + done
                got = os.preadv(handle.fileno(), [into[done : done + PIECE]], at)
                if got == 0:  # it was longer a moment ago
                    raise cut_short(entry.file, os.fstat(handle.fileno()).st_size, entry.start + entry.nbytes)
                done += got
        return tensor


@contextmanager
def _opened(entry: Entry) -> Iterator[BinaryIO]:
    """The file of a tensor, still as it was when its header was read."""
    with opened(entry.file) as handle:
        if stamp_of(handle) != entry.stamp:
            raise UserError(
                f"{entry.file} was changed or replaced since its header was read",
                why="weights of two checkpoints would be mixed",
                do="give the command again",
            )
        yield handle


def empty(shape: Sequence[int], dtype: torch.dtype, name: str) -> Tensor:
    """As torch.empty, for the weights `name`; large ones ask for huge pages, over which weights are read faster."""
    size = math.prod(shape) * dtype.itemsize
    try:
        return (zeros if size >= LARGE else torch.empty)(shape, dtype=dtype)
    except RuntimeError as error:  # torch has no error of its own for this
        raise UserError(
            f"There is not enough memory for {name}",
            got=f"{size:,} bytes",
            do="let this process have more (ulimit -v, a container's limit); `cavelight plan` says how much it needs",
        ) from error


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written: its name, its first bytes (length and header), where each tensor begins, and its size.

    `starts` counts from the beginning of the file, in the order in which the tensors lie. `nbytes` is the whole file.
    """

    file: str
    header: bytes
    starts: dict[str, int]
    nbytes: int


def layout(entries: Sequence[Entry], shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """One file, or shards of at most `shard_bytes` of tensors each; what is larger has a shard to itself.

    That may be a tensor, or one matrix of all experts of a layer: they lie one behind the other, to be mapped as one.
    """
    groups: list[list[Entry]] = [[]]
    size = 0
    for _, together in groupby(entries, key=lambda entry: EXPERT.sub(r"\1\2", entry.name)):
        some = list(together)
        nbytes = sum(entry.nbytes for entry in some)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1] += some
        size += nbytes
    count = len(groups)
    if count == 1:
        return (_shard(SINGLE, groups[0]),)
    return tuple(_shard(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1))


def _shard(file: str, group: Sequence[Entry]) -> Shard:
    # Wide ones first keeps every tensor aligned; each kind for itself, the words of a layer's experts side by side.
    group = sorted(group, key=lambda entry: (-entry.dtype.itemsize, CODES[entry.dtype]))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for entry in group:
        offsets[entry.name], end = end, end + entry.nbytes
        place = (offsets[entry.name], end)
        described[entry.name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": place}
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    header = struct.pack("<Q", len(encoded)) + encoded
    starts = {name: len(header) + offset for name, offset in offsets.items()}
    return Shard(file, header, starts, len(header) + end)


def index_of(shards: Sequence[Shard], entries: Sequence[Entry]) -> bytes | None:
    """The content of model.safetensors.index.json, names in the order of `entries`; None where one file holds all."""
    if len(shards) == 1:
        return None
    files = {name: shard.file for shard in shards for name in shard.starts}
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": {entry.name: files[entry.name] for entry in entries},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def write_safetensors(
    folder: Path, entries: Sequence[Entry], tensor: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `entries` into `folder`, as one file or as shards of at most `shard_bytes` of tensors and their index.

    `tensor` is asked for each one when its turn comes, so no more than one has to exist at a time.
    """
    # The library's writer wants the whole shard in memory and loses the errno of a full disk, so this one streams.
    shards, by_name = layout(entries, shard_bytes), {entry.name: entry for entry in entries}
    for shard in shards:
        with open(folder / shard.file, "wb") as handle:
            handle.write(shard.header)
            for name in shard.starts:
                value, entry = tensor(name), by_name[name]
                assert (tuple(value.shape), value.dtype) == (entry.shape, entry.dtype), name
                handle.write(bytes_of(value.detach().cpu().contiguous()))
    index = index_of(shards, entries)
    if index is not None:
        (folder / INDEX).write_bytes(index)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, for reading from and writing to."""
    assert tensor.is_contiguous()
    return tensor.flatten().view(torch.uint8).numpy().data
