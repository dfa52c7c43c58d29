"""Mapped weights whose files change, and weights that are read instead."""

import os
import re
import resource
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cavelight.api import load
from cavelight.data.tokenizer import train_tokenizer
from cavelight.errors import UserError
from cavelight.spec.formats import INT8
from cavelight.weights import files, headers
from cavelight.weights.convert import convert
from cavelight.weights.files import SINGLE, Entry, Safetensors, layout
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .mapping import CONFIG, answer, in_files, numbers, saved, stored
from .run_models import random_model
from .shards import write

# Files that change


def test_a_checkpoint_that_is_replaced_goes_on_answering(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = read_checkpoint(folder, check_finite=False)  # most pages were never touched
    expected = answer(read_checkpoint(folder, mapped=False))
    newer = random_model(CONFIG, 1, torch.bfloat16)
    write_checkpoint(newer, folder)  # beside, and renamed
    assert torch.equal(answer(model), expected)
    assert torch.equal(answer(read_checkpoint(folder)), answer(newer))
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(answer(model), expected)


def test_a_conversion_over_the_folder_too(tmp_path: Path) -> None:
    folder, other = stored(tmp_path / "a", INT8), saved(tmp_path / "b", seed=1)
    model = read_checkpoint(folder, check_finite=False)
    expected = answer(read_checkpoint(folder, mapped=False))
    convert(other, folder, INT8)
    assert torch.equal(answer(model), expected)
    assert not torch.equal(answer(read_checkpoint(folder)), expected)


CHANGED = "was changed or replaced since its header was read"


@pytest.mark.parametrize("left", [0, 1, 200])
def test_a_file_cut_short_since_its_header_was_read(tmp_path: Path, left: int) -> None:
    write(tmp_path, {"a": torch.zeros(1000)})
    checkpoint = Safetensors(tmp_path)
    os.truncate(tmp_path / SINGLE, left)
    for read in (lambda: checkpoint.mapped(["a"]), lambda: checkpoint.tensor("a")):
        with pytest.raises(UserError, match=CHANGED):
            read()


@pytest.mark.parametrize(
    "way",
    ["deleted and made anew", "overwritten in place", "grown, at the same time", "renamed onto, at the same time"],
)
def test_a_file_changed_since_its_header_was_read(tmp_path: Path, way: str) -> None:
    """The system's number of a file does not tell: it is soon given to another."""
    write(tmp_path, {"a": torch.zeros(1000)})
    checkpoint, file = Safetensors(tmp_path), tmp_path / SINGLE
    before = file.stat()
    if way == "deleted and made anew":
        file.unlink()
        write(tmp_path, {"a": torch.ones(1000)})
    elif way.startswith("renamed"):
        (tmp_path / "beside").write_bytes(file.read_bytes()[:-4] + bytes([0, 0, 128, 63]))
        (tmp_path / "beside").rename(file)
    else:
        with open(file, "r+b" if way == "overwritten in place" else "ab") as handle:
            handle.seek(-4, os.SEEK_END)
            handle.write(bytes([0, 0, 128, 63]))
    later = before.st_mtime_ns + (0 if "same time" in way else 1)
    os.utime(file, ns=(later, later))
    for read in (lambda: checkpoint.mapped(["a"]), lambda: checkpoint.tensor("a"), lambda: checkpoint.rows("a", 1, 2)):
        with pytest.raises(UserError, match=CHANGED):
            read()


def test_files_are_opened_once_for_their_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was replaced between two openings would be taken for what the header spoke of."""
    folder, read = saved(tmp_path / "model", shard_bytes=1), list[str]()
    opening = headers.opened
    monkeypatch.setattr(headers, "opened", lambda file: read.append(file.name) or opening(file))
    Safetensors(folder)
    assert sorted(read) == sorted(file.name for file in folder.glob("model*"))


def test_a_file_gone_since_its_header_was_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(1000)})
    checkpoint = Safetensors(tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(UserError, match="is missing"):
        checkpoint.mapped(["a"])


def test_a_file_replaced_since_its_header_was_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    checkpoint = Safetensors(folder)
    write_checkpoint(random_model(CONFIG, 1, torch.bfloat16), folder)  # all lies in the same places
    for read in (lambda: checkpoint.mapped(["lm_head.weight"]), lambda: checkpoint.tensor("lm_head.weight")):
        with pytest.raises(UserError, match=CHANGED):
            read()


def test_no_more_files_may_be_open(tmp_path: Path) -> None:
    """Each that is mapped is held open. What is too many to map is read, while a single one can still be opened."""
    folder = saved(tmp_path / "model", shard_bytes=1)
    expected = answer(read_checkpoint(folder))
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1, limits[1]))  # the lowest are given out first
        while held:
            os.close(held.pop())
        model = read_checkpoint(folder)
        assert 0 < len(in_files(model, folder)) < len(numbers(model))
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(UserError, match=r"Too many open files. Do: let this process hold more files open"):
            Safetensors(folder)
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert torch.equal(answer(model), expected)


# Reading instead


def test_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model")
    train_tokenizer(["import os"], 300).save(folder)
    assert in_files(load(folder)[0], folder)
    assert not in_files(load(folder, mapped=False)[0], folder)
    monkeypatch.setenv(files.SWITCH, "0")
    assert not in_files(load(folder)[0], folder)
    assert in_files(load(folder, mapped=True)[0], folder)
    monkeypatch.setenv(files.SWITCH, "1")
    assert in_files(load(folder)[0], folder)


def test_copies_are_compared_with_what_lies(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    entry = Safetensors(folder).entries["lm_head.weight"]
    with open(entry.file, "r+b") as handle:
        handle.seek(entry.start)
        handle.write(bytes(2))
    with pytest.raises(UserError, match=r"is not a copy of lm_head.weight. Got: 1 of"):
        read_checkpoint(folder)


def test_memory_for_what_is_read() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for shape in ((3, 5), (3, 1024, 1537), (0, 7)):
            tensor = files.empty(shape, dtype, "a")
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
            tensor.copy_(torch.arange(tensor.numel()).view(shape) % 100)
            assert tensor.sum(dtype=torch.float64) == (torch.arange(tensor.numel()) % 100).sum()


def test_no_memory_for_what_is_read() -> None:
    with pytest.raises(UserError, match=r"for a. Got: 4,611,686,018,427,387,904 bytes. Do: let this process have"):
        files.empty((2**60,), torch.float32, "a")  # more than any address space holds


def test_headers_take_no_more_memory_than_they_are_long(tmp_path: Path) -> None:
    """Python sets aside what it is told to read, and 100 MB are not always there."""
    folder = saved(tmp_path / "model", shard_bytes=1)
    tracemalloc.start()
    try:
        entries = Safetensors(folder).entries
        assert entries and tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    """Reading it instead would need the memory that is not there."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this system counts all that might be written")
    kilobytes = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
    count = (int(kilobytes["MemTotal"]) + int(kilobytes["SwapTotal"]) + 2**20) << 10
    file = layout([Entry("a", (count,), torch.uint8)], count)[0]
    (tmp_path / SINGLE).write_bytes(file.header)
    os.truncate(tmp_path / SINGLE, file.nbytes)  # a hole
    view = Safetensors(tmp_path).mapped(["a"])
    assert view is not None and view.shape == (1, count) and not view[0, -1]


def test_systems_that_do_not_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is given up, to be mapped in huge pages; where that cannot be asked, nothing else changes."""

    def refuse(*arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    first = saved(tmp_path / "first")
    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    second = saved(tmp_path / "second")
    monkeypatch.delattr(os, "posix_fadvise")
    third = saved(tmp_path / "third")
    for other in (second, third):
        assert (first / SINGLE).read_bytes() == (other / SINGLE).read_bytes()


def test_where_files_cannot_be_mapped_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(19, "No such device")

    folder = saved(tmp_path / "model")
    expected = answer(read_checkpoint(folder))
    monkeypatch.setattr(files.mmap, "mmap", refuse)
    model = read_checkpoint(folder)
    assert not in_files(model, folder) and torch.equal(answer(model), expected)
