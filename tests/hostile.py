"""Checkpoints damaged on purpose, one way a function, each from a seeded source of chance.

A damage to a file takes a header and its tensors' bytes and gives the file; one to a folder works on files in place.
Damages that NEVER_SOUND names leave nothing that may be read; the others may by chance leave a sound checkpoint.
"""

import copy
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavelight.weights.headers import DTYPES, INDEX

from .shards import shard, write

Header = dict[str, Any]
SHAPES = ((), (0,), (1,), (5,), (2, 3), (3, 0), (1, 2, 4))
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 10**9, 2**63, 10**30, 1.5, float("nan"), float("-inf"), "", "F32", "../x"),
    *("\ud800", "\x1b[2J", "x" * 1000, [], {}, [[]], [0, 10**12], [None, "a"], {"a": {"b": []}}, [1] * 100),
)


def sound(rng: random.Random) -> tuple[Header, bytes]:
    """The header and data of a file with a few tensors, one of them at least not empty, in any order."""
    header: Header = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    end, names = 0, [f"layers.{i}.weight" for i in range(rng.randint(1, 5))]
    for i, name in enumerate(names):
        code, shape = rng.choice(list(DTYPES)), rng.choice(SHAPES) if i else (2, 3)
        start, end = end, end + torch.Size(shape).numel() * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    shuffled = list(header.items())
    rng.shuffle(shuffled)
    return dict(shuffled), rng.randbytes(end)


def flip(rng: random.Random, content: bytes, stop: int) -> bytes:
    """Some bytes before `stop` changed to others."""
    damaged = bytearray(content)
    for at in (rng.randrange(stop) for _ in range(rng.randint(1, 4))):
        damaged[at] = rng.choice((damaged[at] ^ 1 << rng.randrange(8), *b'0"{}[],:- \x00\xff'))
    return bytes(damaged)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a JSON value with each of its keys or positions."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def replace_one(rng: random.Random, value: Any) -> Any:
    """A copy with a random JSON value in place of any one."""
    value = copy.deepcopy(value)
    container, key = rng.choice(list(places(value)))
    container[key] = rng.choice(VALUES)
    return value


def tensors_of(header: Header) -> list[Header]:
    return [described for name, described in header.items() if name != "__metadata__"]


# Files


def byte_flips(rng: random.Random, header: Header, data: bytes) -> bytes:
    content = shard(header, data)
    return flip(rng, content, len(content) - len(data))


def cut(rng: random.Random, header: Header, data: bytes) -> bytes:
    content = shard(header, data)
    return content[: rng.randrange(len(content))]


def wrong_length(rng: random.Random, header: Header, data: bytes) -> bytes:
    content = shard(header, data)
    length = int.from_bytes(content[:8], "little")
    near = (length + by for by in (-length, -2, -1, 1, 2, len(data) + 1))
    return rng.choice((*near, 1, 10**8, 10**9, 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]


def moved_extents(rng: random.Random, header: Header, data: bytes) -> bytes:
    described = rng.choice([t for t in tensors_of(header) if t["data_offsets"][0] < t["data_offsets"][1]])
    start, end = described["data_offsets"]
    by = rng.choice((1, 2, end - start, len(data), 10**9, 2**62, 2**63)) * rng.choice((1, -1))
    described["data_offsets"] = rng.choice(([start + by, end + by], [start, end + by], [start + by, end], [end, start]))
    return shard(header, data)


def wrong_elements(rng: random.Random, header: Header, data: bytes) -> bytes:
    described = rng.choice(tensors_of(header))
    shapes: tuple[list[Any], ...] = (
        *([10**9], [10**30], [2**63], [2**64], [2**32, 2**32], [-1], [-2, -3], [0, 2**62], [2**40, 2**40, 0]),
        *([True], [6.0], ["6"], [[6]], [None], [1] * 50, [1] * 50 + described["shape"], [10**4000] * 50),
    )
    described["shape"] = shape = rng.choice(shapes)
    if rng.random() < 0.5 and all(type(length) is int and length < 10**40 for length in shape):
        start = described["data_offsets"][0]
        elements = 1
        for length in shape[:9]:
            elements *= length
        described["data_offsets"] = [start, start + elements * 4]
    return shard(header, data)


def doubled_keys(rng: random.Random, header: Header, data: bytes) -> bytes:
    text = json.dumps(header)
    name = rng.choice(list(header))
    inner = rng.choice(('"dtype": ', '"shape": ', '"data_offsets": '))
    again = {'"dtype": ': '"F32"', '"shape": ': "[2]", '"data_offsets": ': "[0, 8]"}[inner]
    return shard(
        rng.choice(
            (
                text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}",
                text.replace(inner, f"{inner}{again}, {inner}", 1),
                '{"__metadata__": {"a": "b", "a": "b"}, ' + text[1:].replace("__metadata__", "format"),
            )
        ).encode(),
        data,
    )


def any_value(rng: random.Random, header: Header, data: bytes) -> bytes:
    return shard(replace_one(rng, header), data)


def wrong_keys(rng: random.Random, header: Header, data: bytes) -> bytes:
    described = rng.choice(tensors_of(header))
    key = rng.choice(list(described))
    match rng.randrange(3):
        case 0:
            del described[key]
        case 1:
            described[rng.choice((key.upper(), key + " ", ""))] = described.pop(key)
        case 2:
            described["strides"] = rng.choice(VALUES)
    return shard(header, data)


def odd_names(rng: random.Random, header: Header, data: bytes) -> bytes:
    old = rng.choice([name for name in header if name != "__metadata__"])
    odd = (
        "",
        " ",
        "\0",
        "\x1b[2J",
        "\ud800",
        "x" * 10_000,
        "a\nb",
        "\u202e",
        "é" * 40,
        "__metadata__",
        "../x",
        "[red]",
    )
    new = rng.choice(odd)
    return shard({new if name == old else name: value for name, value in header.items()}, data)


def surplus(rng: random.Random, header: Header, data: bytes) -> bytes:
    text, more = json.dumps(header).encode(), rng.randbytes(rng.randint(1, 20))
    return rng.choice(
        (
            shard(header, data + more),
            shard(header, more + data),
            shard(rng.choice((b" ", b"\n", b"\0", b"\xef\xbb\xbf")) + text, data),
            shard(text + rng.choice((b" ", b"\n\t ", b"\0", b"}", b"{}", b"null")), data),
            shard(header, data) * 2,
        )
    )


def bombs(rng: random.Random, header: Header, data: bytes) -> bytes:
    count = int(10 ** rng.uniform(3.5, 5))
    mark = rng.choice(("[", '{"a":', "[],", "{},", "1" * 10 + ",", "9"))
    text = rng.choice(("{}{}", '{{"a":{}', '{{"__metadata__":{{"a":{}', '{{"a":{{"shape":[{}')).format(mark * count, "")
    return shard(text.encode() + (b"0]}}" if rng.random() < 0.3 else b""), data)


def strangers(rng: random.Random, header: Header, data: bytes) -> bytes:
    archive = io.BytesIO()
    torch.save({"a": torch.ones(3)}, archive)
    legacy = io.BytesIO()
    torch.save({"a": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    kinds = (
        *(pickle.dumps(header, protocol) for protocol in range(6)),
        *(
            archive.getvalue(),
            legacy.getvalue(),
            b"GGUF\3\0\0\0" + data,
            b"version https://git-lfs.github.com/spec/v1\n",
        ),
        *(b"<!DOCTYPE html><html>", b"<?xml version='1.0'?>", json.dumps(header).encode(), bytes(5000), b"", b"\n"),
        *(rng.randbytes(rng.randrange(100)), b"\x1f\x8b\x08" + data, b"\x7fELF" + bytes(60), b"\xff" * 100),
    )
    return rng.choice(kinds)


def headers_of_others(rng: random.Random, header: Header, data: bytes) -> bytes:
    return shard(sound(rng)[0], data)


FILES: tuple[Callable[[random.Random, Header, bytes], bytes], ...] = (
    *(byte_flips, cut, wrong_length, moved_extents, wrong_elements, doubled_keys, any_value, wrong_keys, odd_names),
    *(surplus, bombs, strangers, headers_of_others),
)


# Folders


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    (folder / INDEX).write_text(json.dumps(change(index) or index))


def paths_outside(rng: random.Random, folder: Path) -> None:
    """Beside the folder lies a sound file with the same tensor."""
    shards = sorted(folder.glob("*.safetensors"))
    file = rng.choice(shards)
    outside = folder.parent / f"outside-{folder.name}.safetensors"
    shutil.copy(file, outside)
    paths = (
        *(f"../{outside.name}", str(outside), f"./{file.name}", f"x/../../{outside.name}", f"{folder}/{file.name}"),
        *("..", ".", "", "/", "\\\\host\\share", f"..\\{outside.name}", f"{file.name}\0", f"{file.name}\n", "~/a"),
        *(f"../{folder.name}/{file.name}", "\ud800", "%2e%2e/a", f"{file.name}/"),
    )
    path = rng.choice(paths)

    def point(index: dict[str, Any]) -> None:
        files = index["weight_map"]
        files.update({name: path for name in files if files[name] == file.name})

    change_index(folder, point)


def index_values(rng: random.Random, folder: Path) -> None:
    change_index(folder, lambda index: replace_one(rng, index))


def index_bytes(rng: random.Random, folder: Path) -> None:
    content = (folder / INDEX).read_bytes()
    cut = content[: rng.randrange(len(content))]
    (folder / INDEX).write_bytes(rng.choice((cut, flip(rng, content, len(content)))))


def index_doubles(rng: random.Random, folder: Path) -> None:
    text = (folder / INDEX).read_text()
    name, file = rng.choice(list(json.loads(text)["weight_map"].items()))
    twice = f'"{name}": "{file}"'
    if rng.random() < 0.5:
        (folder / INDEX).write_text(text.replace(twice, f"{twice}, {twice}"))
    else:
        (folder / INDEX).write_text(text.replace('"weight_map"', '"weight_map": {"a": "b"}, "weight_map"'))


def mixed_up_shards(rng: random.Random, folder: Path) -> None:
    one, other = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    match rng.randrange(4):
        case 0:
            one.unlink()
        case 1:
            one.rename(folder / "gone.safetensors")
        case 2:
            shutil.copy(one, other)
        case 3:
            first, second = one.read_bytes(), other.read_bytes()
            one.write_bytes(second)
            other.write_bytes(first)


def odd_files(rng: random.Random, folder: Path) -> None:
    """Loops, pipes, devices, folders in place of a file; and, as the hub's cache has it, a link to the file itself."""
    file = rng.choice(sorted(folder.iterdir()))
    kept = folder.parent / f"kept-{folder.name}"
    file.rename(kept)
    match rng.randrange(9):
        case 0:
            file.symlink_to(file.name)
        case 1:
            file.symlink_to("loop")
            (folder / "loop").symlink_to(file.name)
        case 2:
            file.symlink_to("nowhere")
        case 3:
            file.mkdir()
        case 4:
            os.mkfifo(file)
        case 5:
            file.symlink_to(rng.choice(("/dev/null", "/dev/zero", "/dev/tty")))
        case 6:
            file.symlink_to(folder)
        case 7:
            file.touch(mode=0o000)
        case 8:
            file.symlink_to(kept)


FOLDERS: tuple[Callable[[random.Random, Path], None], ...] = (
    *(paths_outside, index_values, index_bytes, index_doubles, mixed_up_shards, odd_files),
)
# Packed checkpoints


def bad_scales(rng: random.Random, folder: Path, tensors: dict[str, Tensor]) -> None:
    """A scale or two of one matrix that cannot be."""
    name = rng.choice(sorted(name for name in tensors if name.endswith(("_scale", "_scale_inv"))))
    damaged = tensors[name].clone()
    for _ in range(rng.randint(1, 2)):
        value = rng.choice((float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.5))
        damaged.view(-1)[rng.randrange(damaged.numel())] = value
    write(folder, tensors | {name: damaged})


def config_values(rng: random.Random, folder: Path, tensors: dict[str, Tensor]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(replace_one(rng, json.loads(file.read_bytes()))))


def config_bytes(rng: random.Random, folder: Path, tensors: dict[str, Tensor]) -> None:
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(flip(rng, content, len(content)))


PACKED: tuple[Callable[[random.Random, Path, dict[str, Tensor]], None], ...] = (
    *(bad_scales, config_values, config_bytes),
)
# Damages after which nothing may be read, and what every refusal has to say.
NEVER_SOUND = {
    "cut": r"is cut short|is not a safetensors file",
    "wrong_length": r"is cut short|is not a safetensors file|holds broken JSON",
    "moved_extents": r"makes no sense|do not lie side by side|is cut short",
    "doubled_keys": r"a key occurs twice",
    "bombs": r"holds broken JSON|makes no sense|is not a safetensors file",
    "strangers": r"is not a safetensors file",
    "paths_outside": r"names a shard outside its folder",
    "index_doubles": r"a key occurs twice",
    "mixed_up_shards": r"is missing|is stored twice|does not fit its shards",
    "bad_scales": r"holds scales that are not finite and positive",
}
