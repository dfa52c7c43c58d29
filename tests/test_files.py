"""Sharded safetensors: what is written, that others read it, and every way in which a folder can be broken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from cavelight.errors import UserError
from cavelight.weights.files import INDEX, SINGLE, Entry, Safetensors, write_safetensors

# An odd number of 2-byte elements before 4-byte ones: written in this order, the wide tensor would lie askew.
TENSORS = {
    "norm": torch.arange(3).bfloat16(),
    "bias": torch.tensor([0.1, -2.5]),
    "half": torch.tensor([[1.5], [2.5], [-0.0]], dtype=torch.float16),
    "wide": torch.linspace(-1, 1, 12).view(3, 4),
    "last": torch.linspace(-1, 1, 5).bfloat16(),
}


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = 2**20) -> None:
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(folder, entries, tensors.__getitem__, shard_bytes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def shard(content: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    header = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(header)) + header + data


def described(start: int, end: int, dtype: str = "F32", shape: tuple[Any, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}


def read_all(folder: Path) -> dict[str, Tensor]:
    files = Safetensors(folder)
    return {name: files.tensor(name).clone() for name in files.entries}


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


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(2)})
    whole = (tmp_path / SINGLE).read_bytes()
    for size in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"is cut short|is not a safetensors file"):
            Safetensors(tmp_path)


def test_a_shard_cut_short_is_named_with_its_sizes(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, shard_bytes=1)
    cut = tmp_path / "model-00004-of-00005.safetensors"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{cut.name} is cut short. Got: {size - 1} of {size} bytes"):
        Safetensors(tmp_path)


def break_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def point_to(file: Any) -> Callable[[Path], None]:
    return break_index(lambda index: index["weight_map"].update(wide=file))


def put(content: bytes, file: str = "model-00004-of-00005.safetensors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return damage


def remove(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()

    return damage


WIDE = "model-00004-of-00005.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(INDEX), rf"holds no weights that can be read. Got: shards without {INDEX}: model-00001-of-00005"),
        (remove(WIDE), f"The shard {WIDE} is missing in .*complete the download"),
        (put(b"{", INDEX), f"{INDEX} holds broken JSON"),
        (put(b"[" * 100_000, INDEX), f"{INDEX} holds broken JSON"),
        (put(b"\xff\xfe\x00", INDEX), f"{INDEX} holds broken JSON"),
        (put(b"[]", INDEX), f"{INDEX} holds JSON that is no object. Got: list"),
        (put(b"{}", INDEX), f"{INDEX} has no weight_map. Got: keys none"),
        (put(b'{"weight_map": {"a": "x", "a": "y"}}', INDEX), f"{INDEX} holds broken JSON. Got: a key occurs twice"),
        (break_index(lambda index: index.update(weight_map=[])), "has no weight_map. Got: keys metadata, weight_map"),
        (point_to("../secret.safetensors"), r"names a shard outside its folder. Got: '\.\./secret.safetensors'"),
        (point_to("/etc/passwd"), "names a shard outside its folder. Got: '/etc/passwd'"),
        (point_to("sub/wide.safetensors"), "names a shard outside its folder"),
        (point_to(".."), "names a shard outside its folder"),
        (point_to(""), "names a shard outside its folder"),
        (point_to("a\0b"), "names a shard outside its folder"),
        (point_to(7), "names a shard outside its folder. Got: 7"),
        (point_to("elsewhere.safetensors"), "The shard elsewhere.safetensors is missing"),
        (point_to("model-00001-of-00005.safetensors"), "does not fit its shards. Got: wide is not in model-00001"),
        (break_index(lambda index: index["weight_map"].update(more=WIDE)), f"Got: more is not in {WIDE}"),
        (put(shard({"wide": described(0, 8), "x": described(8, 16)}, bytes(16)), WIDE), f"Got: {WIDE} holds x besides"),
        (put(shard({"wide": described(0, 8), "last": described(8, 16)}, bytes(16)), WIDE), "last is stored twice"),
        (put(shard({}), SINGLE), "holds two sets of weights"),
        (put(b""), f"{WIDE} is not a safetensors file. Got: 0 bytes"),
        (put(struct.pack("<Q", 10**9)), "is not a safetensors file. Got: a header of 1,000,000,000 bytes"),
        (put(struct.pack("<Q", 2**64 - 1) + bytes(99)), "is not a safetensors file. Got: a header of 18,446"),
        (put(struct.pack("<Q", 99) + b"{}"), r"is cut short. Got: 10 of 107 bytes"),
        (put(b"version https://git-lfs.github.com/spec/v1\n"), r"is a pointer of Git LFS.*`git lfs pull`"),
        (put(shard(b"not json")), f"{WIDE} holds broken JSON"),
        (put(shard(b"[1]")), f"{WIDE} holds JSON that is no object"),
        (put(shard(b'{"a": 1, "a": 2}')), "holds broken JSON. Got: a key occurs twice"),
        (put(shard({"wide": 1})), f"The header of .*{WIDE} makes no sense. Got: wide: 1"),
        (put(shard({"wide": {"dtype": "F32", "shape": [2]}})), "makes no sense"),
        (put(shard({"wide": described(0, 8, shape=(-2,))}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(0, 8, shape=("2",))}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(0, 12)}, bytes(12))), "makes no sense"),
        (put(shard({"wide": described(-8, 0)}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(8, 0)}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(0, 2, "F8_E4M3")}, bytes(2))), "block-fp8.*wide is F8_E4M3.*fp8_cast_bf16.py"),
        (put(shard({"wide": described(0, 16, "I64")}, bytes(16))), "of a dtype that Cavelight cannot read. Got: I64"),
    ],
)
def test_broken_folders(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path, TENSORS, shard_bytes=1)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        Safetensors(tmp_path)


@pytest.mark.parametrize("ends", [(8, 12), (16, 24)], ids=["overlap", "gap"])
def test_extents_that_are_not_side_by_side(tmp_path: Path, ends: tuple[int, int]) -> None:
    second = described(ends[1] - 8, ends[1])
    (tmp_path / SINGLE).write_bytes(shard({"a": described(0, 8), "b": second}, bytes(ends[1])))
    with pytest.raises(UserError, match=rf"{SINGLE} cannot be read"):
        read_all(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"Got: no file \*\.safetensors.*\.bin or \.pt format have to be converted"):
        Safetensors(tmp_path)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes change, the file is read as something or refused with a sentence."""
    write(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(2)})
    content = bytearray((tmp_path / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / SINGLE).write_bytes(content)
    try:
        read_all(tmp_path)
    except UserError as error:
        assert SINGLE in str(error)
