"""Weights that stay in their files: the same to the bit, never written to, shared; and those that are read instead."""

import copy
import math
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cavelight.api import Engine, Request, load
from cavelight.data.tokenizer import train_tokenizer
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.formats import FP8, INT4, INT8, PLAIN, Format
from cavelight.weights import files
from cavelight.weights.convert import convert
from cavelight.weights.files import SINGLE, Entry, Safetensors, layout
from cavelight.weights.headers import INDEX
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .reference.tiny import tiny
from .run_models import random_model
from .shards import TENSORS, described, same_bits, shard, write

CONFIG = tiny(num_nextn_predict_layers=1, kv_lora_rank=16, n_routed_experts=12)  # of which the 10th is not the 2nd
HUGE = Path("/sys/kernel/mm/transparent_hugepage").is_dir()
TOKENS = torch.tensor([3, 1, 4, 1, 5])
STACK, SHARED = "model.layers.1.mlp.experts.{}_proj", "model.layers.1.mlp.shared_experts.up_proj"


def saved(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shard_bytes: int = 2**30) -> Path:
    write_checkpoint(random_model(CONFIG, seed, dtype), folder, shard_bytes=shard_bytes)
    return folder


def stored(folder: Path, format: Format, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = 2**30) -> Path:
    """As our own writers leave it: of packed ones that is `convert`."""
    plain = saved(folder / "plain", dtype, shard_bytes=shard_bytes)
    if format == PLAIN:
        return plain
    convert(plain, folder / "packed", format, shard_bytes=shard_bytes)
    return folder / "packed"


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def in_files(model: nn.Module, folder: Path) -> set[str]:
    """The model's tensors that lie in mapped files of a folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [re.match(r"(\w+)-(\w+) ", line) for line in lines if f"{folder.resolve()}/" in line]
    places = [range(int(found[1], 16), int(found[2], 16)) for found in ranges if found]
    return {name for name, t in numbers(model).items() if any(t.data_ptr() in place for place in places)}


def own_pages(folder: Path) -> int:
    """Bytes of mapped files that this process has of its own, because it wrote to them."""
    own, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            ours = f"{folder.resolve()}/" in line
        elif ours and line.startswith("Private_Dirty:"):
            own += int(line.split()[1]) << 10
    return own


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# The same to the bit


@pytest.mark.parametrize("wanted", [None, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("format", "dtype", "packed"),
    [
        *((PLAIN, dtype, None) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((format, torch.bfloat16, packed) for format in (FP8, INT8, INT4) for packed in (True, False)),
        (INT8, torch.float32, True),  # whose scales are as wide as its words
    ],
    ids=str,
)
def test_mapped_is_read_to_the_bit(
    tmp_path: Path, format: Format, dtype: torch.dtype, packed: bool | None, wanted: torch.dtype | None
) -> None:
    folder = stored(tmp_path, format, dtype, shard_bytes=20_000)
    mapped, read = (read_checkpoint(folder, wanted, packed=packed, mapped=way) for way in (True, False))
    assert in_files(mapped, folder) and not in_files(read, folder)
    ours, theirs = numbers(mapped), numbers(read)
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name].detach(), theirs[name].detach()) for name in ours)
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in ours.values())
    with torch.inference_mode():
        assert torch.equal(mapped.logits(TOKENS), read.logits(TOKENS))


def test_the_engine_answers_the_same_and_has_as_many_pages(tmp_path: Path) -> None:
    folder, answers = saved(tmp_path / "model"), []
    for way in (True, False):
        engine = Engine(read_checkpoint(folder, mapped=way), memory=1 << 18)
        (one,) = engine.submit(Request(TOKENS.tolist(), 20, stop_ids=frozenset(), likeliest=1))
        engine.run()
        answers.append((one.tokens, engine.load.pages))
    assert answers[0] == answers[1]
    assert own_pages(folder) == 0


def test_what_is_copied_is_not_mapped_beside_the_copy(tmp_path: Path) -> None:
    """Its pages would count as resident memory, which `plan` knows nothing of."""
    folder = saved(tmp_path / "model", shard_bytes=1)  # files with a parameter each
    model, entries = read_checkpoint(folder, torch.float32), Safetensors(folder).entries
    biases = {entry.file.name for entry in entries.values() if entry.dtype == torch.float32}
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert biases and {line.rpartition("/")[2] for line in lines if f"{folder.resolve()}/" in line} == biases
    assert next(model.parameters()).dtype == torch.float32


# What lies in the file


@pytest.mark.parametrize("shard_bytes", [20_000, 2**30], ids=["shards", "one file"])
@pytest.mark.parametrize(
    ("format", "dtype"),
    [*((format, torch.bfloat16) for format in (PLAIN, INT8, INT4, FP8)), (INT8, torch.float32)],
    ids=str,
)
def test_in_files_of_ours_all_lies_but_what_one_tensor_holds_two_of(
    tmp_path: Path, format: Format, dtype: torch.dtype, shard_bytes: int
) -> None:
    folder = stored(tmp_path, format, dtype, shard_bytes)
    model = read_checkpoint(folder, dtype, packed=True if format != PLAIN else None)
    rest = numbers(model).keys() - in_files(model, folder)
    assert {name.rpartition(".")[2] for name in rest} == {"k_up", "v_up"}


def test_experts_of_others_are_copied_and_the_rest_lies(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    before = read_checkpoint(folder, mapped=False)
    save_file(load_file(folder / SINGLE), folder / SINGLE)  # which sorts by name
    model = read_checkpoint(folder)
    lie = in_files(model, folder)
    assert f"{SHARED}.weight" in lie and not any(".experts." in name for name in lie)
    assert all(torch.equal(t, numbers(before)[name]) for name, t in numbers(model).items())


def test_other_numbers_than_are_stored_are_copied(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = read_checkpoint(folder, torch.float32)
    assert {name.rpartition(".")[2] for name in in_files(model, folder)} == {"e_score_correction_bias"}


def test_stacks_are_kept_together(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", shard_bytes=2_000)
    names = Safetensors(folder).entries
    for part in ("gate", "up", "down"):
        experts = [
            names[name] for name in names if re.fullmatch(rf"model.layers.1.mlp.experts.\d+.{part}_proj.*", name)
        ]
        assert len(experts) == CONFIG.n_routed_experts and len({entry.file for entry in experts}) == 1
        assert sum(entry.nbytes for entry in experts) > 2_000
    assert (folder / INDEX).is_file()
    assert {name for file in folder.glob("*.safetensors") for name in load_file(file)} == set(names)


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_only_one_stack_for_itself_makes_a_shard_larger_than_asked_for(tmp_path: Path, limit: int) -> None:
    folder = saved(tmp_path / "model", shard_bytes=limit)
    entries = list(Safetensors(folder).entries.values())
    large = 0
    for file in {entry.file for entry in entries}:
        there = [entry for entry in entries if entry.file == file]
        stacks = {re.sub(r"\.experts\.\d+", "", entry.name) for entry in there}
        large += sum(entry.nbytes for entry in there) > limit
        assert len(stacks) == 1 or sum(entry.nbytes for entry in there) <= limit
    assert (large > 0) == (limit == 2_000)


@pytest.mark.parametrize(
    ("format", "name", "said"),
    [
        *((PLAIN, f"{name}.weight", "numbers that are not finite") for name in (STACK.format("3.up"), SHARED)),
        *((INT8, f"{name}.weight_scale", "scales that are not") for name in (STACK.format("3.up"), SHARED)),
        (PLAIN, "model.layers.2.shared_head.head.weight", "numbers that are not finite"),  # a copy
    ],
)
def test_a_nan_where_it_lies_is_found(tmp_path: Path, format: Format, name: str, said: str) -> None:
    folder = stored(tmp_path, format)
    entry = Safetensors(folder).entries[name]
    with open(entry.file, "r+b") as handle:
        handle.seek(entry.start + entry.nbytes - 2)
        handle.write(torch.tensor([math.nan], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    with pytest.raises(UserError, match=said):
        read_checkpoint(folder, mapped=True)


@pytest.mark.parametrize("askew", [0, 1, 2, 3, 4])
def test_what_lies_askew_is_read(tmp_path: Path, askew: int) -> None:
    header = (
        '{"a":' + str(described(0, 8)).replace("'", '"').replace("(", "[").replace(",)", "]").replace(")", "]") + "}"
    )
    padded = header.encode() + b" " * (-len(header) % 8 + askew)
    values = torch.tensor([1.5, -2.5])
    (tmp_path / SINGLE).write_bytes(shard(padded, values.numpy().tobytes()))
    checkpoint = Safetensors(tmp_path)
    view = checkpoint.mapped(["a"])
    assert (view is not None) == (askew % 4 == 0) and same_bits(checkpoint.tensor("a"), values)
    assert view is None or same_bits(view[0], values)


def test_stacks_need_one_shape_one_dtype_and_the_right_order(tmp_path: Path) -> None:
    parts = {name: torch.arange(4.0).view(2, 2) + n for n, name in enumerate("abc")}
    write(tmp_path, {**parts, "long": torch.zeros(4), "half": torch.zeros(2, 2).half(), "whole": torch.zeros(4).int()})
    checkpoint = Safetensors(tmp_path)
    together = checkpoint.mapped(["a", "b", "c"])
    assert together is not None and torch.equal(together, torch.stack([*parts.values()]))
    for names in (["b", "a"], ["a", "c"], ["c", "long"], ["c", "half"], ["long", "whole"], ["a", "a"]):
        assert checkpoint.mapped(names) is None
    checkpoint.entries["b"] = replace(checkpoint.entries["b"], file=tmp_path / "another")  # at the same place there
    assert checkpoint.mapped(["a", "b"]) is None


def test_single_tensors_of_every_kind(tmp_path: Path) -> None:
    write(tmp_path, TENSORS | {"empty": torch.empty(0, 4)})
    checkpoint = Safetensors(tmp_path)
    views = {name: checkpoint.mapped([name]) for name in checkpoint.entries}
    assert views.pop("empty") is None
    assert all(view is not None and same_bits(view[0], TENSORS[name]) for name, view in views.items())


# In huge pages, from one mapping


def flags(of: str) -> list[set[str]]:
    """What the system says of each range of memory whose line in smaps contains `of`."""
    found, ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            ours = of in line
        elif ours and line.startswith("VmFlags:"):
            found.append(set(line.split()[1:]))
    return found


def test_a_file_is_mapped_once_and_asks_for_huge_pages(tmp_path: Path) -> None:
    folder, before = saved(tmp_path / "model"), len(os.listdir("/proc/self/fd"))
    model = read_checkpoint(folder)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    asked = flags(f"{folder.resolve()}/")
    assert asked and all("nr" in some for some in asked)  # nothing is set aside for what might be written
    assert not HUGE or all("hg" in some for some in asked)
    del model
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not HUGE, reason="this system has no huge pages")
def test_only_large_tensors_ask_for_huge_pages() -> None:
    for size, asks in ((files.LARGE, True), (files.LARGE - 2, False)):
        tensor = files.empty((size // 2,), torch.bfloat16, "a")
        address = tensor.data_ptr()
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        (line,) = (line for line, (start, end) in zip(lines, ranges, strict=True) if start <= address < end)
        assert all(("hg" in some) == asks for some in flags(line.split()[0]))


@pytest.mark.parametrize("format", [PLAIN, INT8], ids=["plain", "int8"])
def test_writers_let_the_system_forget_what_is_on_the_disk(
    tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, fsync, advise = [], os.fsync, os.posix_fadvise

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        said.append((os.fstat(descriptor).st_ino, "on the disk"))

    def forget(descriptor: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        said.append((os.fstat(descriptor).st_ino, "forgotten"))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "posix_fadvise", forget)
    for file in stored(tmp_path, format).glob("*.safetensors"):
        assert [what for number, what in said if number == file.stat().st_ino][-2:] == ["on the disk", "forgotten"]


# Nothing reaches the file


@pytest.mark.parametrize("format", [PLAIN, INT8], ids=["plain", "int8"])
def test_writing_to_a_parameter_leaves_the_file(tmp_path: Path, format: Format) -> None:
    folder = stored(tmp_path, format)
    model, before = read_checkpoint(folder), content(folder)
    with torch.no_grad():
        for tensor in numbers(model).values():
            tensor.zero_()
    assert not any(bool(tensor.any()) for tensor in numbers(model).values())
    assert own_pages(folder) > 0
    assert content(folder) == before
    assert all(torch.equal(a, b) for a, b in zip(read_checkpoint(folder).parameters(), loaded(folder), strict=True))


def loaded(folder: Path) -> Iterator[Tensor]:
    yield from read_checkpoint(folder, mapped=False).parameters()


def test_a_mapped_model_can_be_trained_and_saved_over_itself(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", torch.float32)
    model, before = read_checkpoint(folder), content(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.logits(TOKENS).logsumexp(-1).sum().backward()
    optimizer.step()
    assert content(folder) == before
    changed = {name: tensor.detach().clone() for name, tensor in numbers(model).items()}
    write_checkpoint(model, folder, shift_biases=False)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in numbers(model).items())
    assert all(torch.equal(tensor, changed[name]) for name, tensor in numbers(read_checkpoint(folder)).items())


def test_a_copy_has_memory_of_its_own(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = read_checkpoint(folder)
    assert in_files(model, folder) and not in_files(copy.deepcopy(model), folder)
    torch.save(model.lm_head.weight, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < model.lm_head.weight.nbytes + 10_000


# Files that change


def answer(model: Transformer) -> Tensor:
    with torch.inference_mode():
        return model.logits(TOKENS)


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


@pytest.mark.parametrize("left", [0, 1, 200])
def test_a_file_cut_short_since_its_header_was_read(tmp_path: Path, left: int) -> None:
    write(tmp_path, {"a": torch.zeros(1000)})
    checkpoint = Safetensors(tmp_path)
    size = (tmp_path / SINGLE).stat().st_size
    os.truncate(tmp_path / SINGLE, left)
    with pytest.raises(UserError, match=rf"is cut short. Got: {left} of {size:,} bytes"):
        if checkpoint.mapped(["a"]) is None:
            checkpoint.tensor("a")


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
        with pytest.raises(UserError, match="was replaced since its header was read"):
            read()


def test_no_more_files_may_be_open(tmp_path: Path) -> None:
    """Each that is mapped is held open. What is too many to map is read, while a single one can still be opened."""
    folder = saved(tmp_path / "model", shard_bytes=1)
    expected = answer(read_checkpoint(folder))
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), [os.open(os.devnull, os.O_RDONLY)]
    some = held[0] + 5  # descriptors are given out from the lowest on
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (some, limits[1]))
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


@pytest.mark.parametrize("system", ["as it is", "that refuses", "that knows none"])
def test_memory_for_what_is_read(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    if system == "that refuses":
        monkeypatch.setattr(files.mmap, "mmap", refuse)
    elif system == "that knows none":
        monkeypatch.delattr(files.mmap, "MADV_HUGEPAGE", raising=False)
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for shape in ((3, 5), (3, 1024, 1537), (0, 7)):
            tensor = files.empty(shape, dtype, "a")
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
            tensor.copy_(torch.arange(tensor.numel()).view(shape) % 100)
            assert tensor.sum(dtype=torch.float64) == (torch.arange(tensor.numel()) % 100).sum()


def test_no_memory_for_what_is_read() -> None:
    with pytest.raises(UserError, match=r"There is not enough memory for a. Got: 4,611,686,018,427,387,904 bytes"):
        files.empty((2**60,), torch.float32, "a")  # more than any address space holds


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
