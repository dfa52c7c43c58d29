"""Weights that stay in their files: the same to the bit, never written to, shared."""

import copy
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cavelight.api import Engine, Request
from cavelight.errors import UserError
from cavelight.spec.formats import FP8, INT4, INT8, PLAIN, Format
from cavelight.weights.files import SINGLE, Safetensors
from cavelight.weights.headers import INDEX
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .mapping import CONFIG, HUGE, SHARED, STACK, TOKENS, content, in_files, numbers, own_pages, saved, stored
from .shards import TENSORS, described, same_bits, shard, write

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
