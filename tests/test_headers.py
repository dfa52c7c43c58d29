"""Every way in which a checkpoint's files can be broken, and the sentence that says so."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cavelight.errors import UserError
from cavelight.weights.files import INDEX, SINGLE, Safetensors
from cavelight.weights.headers import abbreviated

from .shards import TENSORS, described, read_all, shard, write


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


def replace(make: Callable[[Path], object], file: str = "model-00004-of-00005.safetensors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return damage


WIDE = "model-00004-of-00005.safetensors"
EIGHT = bytes(8)


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
        (put(struct.pack("<Q", 10**9) + b"{"), "is not a safetensors file. Got: a header of 1,000,000,000 bytes"),
        (put(struct.pack("<Q", 2**64 - 1) + bytes(99)), "is not a safetensors file. Got: a header of 18,446"),
        (put(struct.pack("<Q", 99) + b"{}"), r"is cut short. Got: 10 of 107 bytes"),
        (
            put(b"version https://git-lfs.github.com/spec/v1\n"),
            "not a safetensors file but a pointer of Git LFS.*`git lfs pull`",
        ),
        (put(shard(b"{not json")), f"{WIDE} holds broken JSON"),
        (put(shard(b"[1]")), rf"{WIDE} is not a safetensors file. Got: 11 bytes that begin with b'.x03.*\[1\]'"),
        (put(shard(b'{"a": 1, "a": 2}')), "holds broken JSON. Got: a key occurs twice"),
        (put(shard({"wide": 1})), f"The header of .*{WIDE} makes no sense. Got: wide: 1"),
        (put(shard({"wide": {"dtype": "F32", "shape": [2]}})), "makes no sense"),
        (put(shard({"wide": described(0, 8, shape=(-2,))}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(0, 8, shape=("2",))}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(0, 12)}, bytes(12))), "makes no sense"),
        (put(shard({"wide": described(-8, 0)}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(8, 0)}, bytes(8))), "makes no sense"),
        (put(shard({"wide": described(0, 8, shape=(2.0,))}, EIGHT)), "makes no sense"),
        (put(shard({"wide": described(0, 4, shape=(True,))}, EIGHT)), "makes no sense"),
        (put(shard({"wide": {**described(0, 8), "data_offsets": [0, 8, 8]}}, EIGHT)), "makes no sense"),
        (put(shard({"wide": {**described(0, 8), "data_offsets": [False, 8]}}, EIGHT)), "makes no sense"),
        (put(shard({"wide": {**described(0, 8), "strides": [1]}}, EIGHT)), "makes no sense. Got: wide: .*strides"),
        (put(shard({"wide": described(0, 8, shape=(1,) * 8 + (2,))}, EIGHT)), "makes no sense"),
        (put(shard({"wide": described(0, 4 * 10**9, shape=(10**9,))}, EIGHT)), "cut short.*of 4,000,000,0.. bytes"),
        (put(shard({"wide": described(0, 8, shape=(10**9,))}, EIGHT)), "makes no sense"),
        (put(shard({"wide": described(0, 4 * 10**30, shape=(10**30,))}, EIGHT)), "makes no sense"),
        (put(shard({"wide": described(0, 0, shape=(2**32, 2**32))})), "makes no sense"),
        (put(shard({"wide": described(0, 0, shape=(0, 2**32, 2**32))})), "makes no sense"),
        (put(shard({"wide": described(0, 8), "": described(8, 16)}, bytes(16))), "holds a name that no tensor bears"),
        (put(shard({"x" * 301: described(0, 8)}, EIGHT)), "a name that no tensor bears. Got: 'xxx.*301 characters"),
        (put(shard({"\x1b[31m": described(0, 8)}, EIGHT)), r"a name that no tensor bears. Got: '\\x1b\[31m'"),
        (put(shard({"\ud800": described(0, 8)}, EIGHT)), r"a name that no tensor bears. Got: '\\ud800'"),
        (put(shard({"__metadata__": {"a": 1}, "wide": described(0, 8)}, EIGHT)), "makes no sense. Got: __metadata__"),
        (put(shard({"__metadata__": None, "wide": described(0, 8)}, EIGHT)), "makes no sense. Got: __metadata__"),
        (put(shard({"wide": described(0, 8)}, bytes(9))), f"{WIDE} goes on after its last tensor. Got: 1 bytes more"),
        (put(shard({"wide": described(8, 16)}, bytes(16))), "Got: 8 bytes between the header and wide"),
        (put(shard(b'{"a":' + b"[" * 10**6)), "holds broken JSON. Got: maximum recursion depth"),
        (put(shard(b'{"a":[' + b"[]," * 5 * 10**6)), "holds broken JSON. Got: 15,000,006 bytes that would take"),
        (put(shard('{"wide": 1}'.encode("utf-16-le"))), "holds broken JSON"),
        (put(pickle.dumps([1.5] * 1000)), "not a safetensors file but a pickle.*opening a pickle can run any program"),
        (put(b"PK\x03\x04\0\0\x08\x08archive/data.pkl"), "not a safetensors file but a zip, as PyTorch writes them"),
        (put(b"<!DOCTYPE html>\n<html>"), "not a safetensors file but a page of HTML or XML"),
        (put(b'{"error": "Unauthorized"}'), "not a safetensors file but JSON"),
        (put(b"GGUF\x03\0\0\0" + bytes(50)), "not a safetensors file"),
        (put(bytes(4096)), "not a safetensors file but empty space that was reserved and never written"),
        (replace(os.mkdir), f"{WIDE} is not a file. Got: a folder"),
        (replace(os.mkfifo), f"{WIDE} is not a file. Got: a pipe or device"),
        (replace(lambda file: file.symlink_to("/dev/zero")), f"{WIDE} is not a file. Got: a pipe or device"),
        (replace(lambda file: file.symlink_to(file)), f"{WIDE} cannot be read. Got: Too many levels of symbolic links"),
        (replace(lambda file: file.symlink_to("gone")), f"{WIDE} is missing.*a symlink to gone, where nothing is"),
        (replace(os.mkfifo, INDEX), f"{INDEX} is not a file. Got: a pipe or device"),
        (replace(lambda file: file.symlink_to(file), INDEX), f"{INDEX} cannot be read. Got: Too many levels"),
        (replace(lambda file: file.symlink_to("gone"), INDEX), f"{INDEX} is missing"),
        (break_index(lambda index: index.update(metadata=[1])), r"makes no sense. Got: metadata: \[1\]"),
        (point_to("a\nb"), r"names a shard outside its folder. Got: 'a\\nb'"),
        (point_to("x" * 300), "cannot be read. Got: File name too long"),
        (break_index(lambda index: index["weight_map"].update({"\x1b": WIDE})), r"Got: '\\x1b' is not in|Got: .*x1b"),
        (put(shard({"wide": described(0, 2, "F4")}, bytes(2))), "of a dtype that Cavelight cannot read. Got: 'F4'"),
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
    with pytest.raises(UserError, match=r"do not lie side by side. Got: [48] bytes (shared by|between) a and b"):
        Safetensors(tmp_path)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_empty_tensors_lie_anywhere_between_others(tmp_path: Path, order: str) -> None:
    places = {"a": described(0, 8), "b": described(8, 16), "e": described(8, 8, shape=(0,))}
    content = shard({name: places[name] for name in f"e{order}"}, bytes(range(16)))
    (tmp_path / SINGLE).write_bytes(content)
    assert [read_all(tmp_path)[name].view(torch.uint8).tolist() for name in "abe"] == [
        list(range(8)),
        list(range(8, 16)),
        [],
    ]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"Got: no file \*\.safetensors.*\.bin or \.pt format have to be converted"):
        Safetensors(tmp_path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(UserError, match="There is no folder"):
            Safetensors(path)


def test_long_lists_are_abbreviated_and_harmless() -> None:
    assert abbreviated(["a", "b", "c"], most=2) == "a, b and 1 more"
    assert abbreviated(["a\x1b[0m", "x" * 1000]).isprintable()
    assert len(abbreviated(["x" * 1000] * 1000)) < 500


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
