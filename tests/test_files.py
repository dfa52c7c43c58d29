"""Sharded safetensors: what is written, that others read it, and that what is read is what was written."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cavelight.errors import UserError
from cavelight.weights import files
from cavelight.weights.files import INDEX, SINGLE, Entry, Safetensors, bytes_of, index_of, layout, write_safetensors
from cavelight.weights.headers import DTYPES, read_index

from .shards import TENSORS, entries_of, read_all, same_bits, write


@pytest.mark.parametrize("shard_bytes", [1, 30, 2**20])
def test_what_is_written_is_read_to_the_bit(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path, TENSORS, shard_bytes)
    read = read_all(tmp_path)
    assert read.keys() == TENSORS.keys()
    assert all(same_bits(read[name], TENSORS[name]) for name in TENSORS)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    read = load_file(tmp_path / SINGLE)
    assert read.keys() == TENSORS.keys()
    assert all(same_bits(read[name], TENSORS[name]) for name in TENSORS)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    read = read_all(tmp_path)
    assert all(same_bits(read[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_and_shape(tmp_path: Path, code: str, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel() * DTYPES[code].itemsize
    values = torch.arange(count, dtype=torch.uint8) % (2 if code == "BOOL" else 251)
    tensors = {"a": values.view(DTYPES[code]).view(shape), "b": torch.ones(1)}
    write(tmp_path, tensors)
    for read in (read_all(tmp_path), load_file(tmp_path / SINGLE)):
        assert read.keys() == tensors.keys()
        assert all(same_bits(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("piece", [1, 7, 2**26])
def test_rows_are_a_part_of_the_tensor(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", piece)
    whole = torch.arange(5 * 2 * 3).view(5, 2, 3).bfloat16()
    write(tmp_path, {"before": torch.ones(3), "whole": whole, "empty": torch.empty(0, 4)})
    checkpoint = Safetensors(tmp_path)
    for start in range(6):
        for stop in range(start, 6):
            assert same_bits(checkpoint.rows("whole", start, stop), whole[start:stop])
    assert checkpoint.rows("empty", 0, 0).shape == (0, 4)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a": torch.zeros(1000)})
    checkpoint, preadv = Safetensors(tmp_path), os.preadv
    size = (tmp_path / SINGLE).stat().st_size

    def cutting(*arguments: Any) -> int:
        os.truncate(tmp_path / SINGLE, 200)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", cutting)
    with pytest.raises(UserError, match=rf"is cut short. Got: 200 of {size:,} bytes"):
        checkpoint.tensor("a")


def test_no_memory_for_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a": torch.zeros(2)})
    checkpoint = Safetensors(tmp_path)
    # More than any address space holds; a file of that size fits on few disks.
    checkpoint.entries["a"] = Entry("a", (2**60,), torch.float32, tmp_path / SINGLE, 80)
    with pytest.raises(UserError, match=r"There is not enough memory for a. Got: 4,611,686,018,427,387,904 bytes"):
        checkpoint.tensor("a")


def test_tensors_written_in_any_order_at_their_places_give_the_same_files(tmp_path: Path) -> None:
    entries = entries_of(TENSORS)
    write(tmp_path, TENSORS, shard_bytes=30)
    shards = layout(entries, 30)
    assert {shard.file for shard in shards} == {file.name for file in tmp_path.glob("*.safetensors")}
    for shard in shards:
        content = bytearray(shard.nbytes)
        content[: len(shard.header)] = shard.header
        for name, start in reversed(shard.starts.items()):
            content[start : start + TENSORS[name].nbytes] = bytes_of(TENSORS[name])
        assert (tmp_path / shard.file).read_bytes() == content
    assert (tmp_path / INDEX).read_bytes() == index_of(shards, entries)
    index = read_index(tmp_path)
    assert index and index.metadata["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_every_tensor_lies_aligned(tmp_path: Path) -> None:
    """A reader that maps the file may then hand out views of it, whatever the header's length."""
    for letters in range(1, 9):
        write(tmp_path, TENSORS | {"x" * letters: torch.ones(1)})
        content = (tmp_path / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        for name, entry in Safetensors(tmp_path).entries.items():
            assert (8 + length + header[name]["data_offsets"][0]) % entry.dtype.itemsize == 0


def test_shards_keep_their_limit_and_their_names(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.zeros(100)}
    write(tmp_path, tensors, shard_bytes=80)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 600}
    assert index["weight_map"] == {
        "t0": files[0],
        "t1": files[0],
        "t2": files[1],
        "t3": files[1],
        "t4": files[2],
        "large": files[3],
    }
    for file in files:
        assert set(load_file(tmp_path / file)) == {name for name, at in index["weight_map"].items() if at == file}


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


def test_tensors_are_asked_for_one_by_one_while_writing(tmp_path: Path) -> None:
    complete = []

    def produce(name: str) -> Tensor:
        complete.append(len(list(tmp_path.glob("*.safetensors"))))
        return torch.zeros(4)

    write_safetensors(tmp_path, [Entry(f"t{i}", (4,), torch.float32) for i in range(3)], produce, shard_bytes=16)
    assert complete == [1, 2, 3]  # each when its own shard is open, after those before it were written


def test_headers_tell_shapes_without_reading_tensors(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, shard_bytes=30)
    entries = Safetensors(tmp_path).entries
    assert {name: (entry.shape, entry.dtype) for name, entry in entries.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
