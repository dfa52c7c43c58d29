"""Checkpoint folders: our own round trip to the bit, folders that must be refused, disks that are full."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.weights import files
from cavelight.weights.names import hf_tensors
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .reference.ours import our_model
from .reference.random_weights import random_weights
from .reference.tiny import tiny

WITH_MTP = tiny(num_nextn_predict_layers=1)
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
save = partial(write_checkpoint, shift_biases=False)  # these models have negative biases (see test_bias_shift.py)


def filled(config: ModelConfig, seed: int = 0) -> Transformer:
    return our_model(config, random_weights(config, seed))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(a: Transformer, b: Transformer) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with one MTP module, in one file."""
    save(filled(WITH_MTP), tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / files.SINGLE)
    change(tensors)
    save_file(tensors, folder / files.SINGLE)


# Our own round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [5_000, 2**30], ids=["shards", "one file"])
def test_round_trip_to_the_bit(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    config = tiny(num_nextn_predict_layers=2)
    model = Transformer(config, dtype)
    model.load_state_dict(filled(config).state_dict())
    save(model, tmp_path / "a", shard_bytes=shard_bytes)
    assert ((tmp_path / "a" / files.INDEX).exists(), (tmp_path / "a" / files.SINGLE).exists()) == (
        (True, False) if shard_bytes == 5_000 else (False, True)
    )
    read = read_checkpoint(tmp_path / "a")
    assert_same(read, model)
    assert read.config == config.replace(torch_dtype=str(dtype).removeprefix("torch."))
    save(read, tmp_path / "b", shard_bytes=shard_bytes)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second


def test_a_read_model_trains_and_outlives_its_folder(saved: Path) -> None:
    model = read_checkpoint(saved, mapped=False)
    for file in saved.iterdir():
        file.write_bytes(b"")
    assert_same(model, filled(WITH_MTP))
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    model.logits(torch.tensor([1, 2, 3])).sum().backward()


def test_the_routing_bias_is_float32_whatever_the_weights_are(tmp_path: Path) -> None:
    model = filled(WITH_MTP)
    bias = model.state_dict()[BIAS].clone()
    save(model, tmp_path / "wide")
    read = read_checkpoint(tmp_path / "wide", torch.bfloat16)
    assert read.lm_head.weight.dtype == torch.bfloat16
    assert read.state_dict()[BIAS].dtype == torch.float32 and torch.equal(read.state_dict()[BIAS], bias)
    biases = {name: b.clone() for name, b in model.named_buffers()}
    save(model.bfloat16(), tmp_path / "narrow")
    assert all(torch.equal(b, biases[name]) for name, b in model.named_buffers())  # the cast left them alone
    stored = weights_of(tmp_path / "narrow")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {
        name for name in stored if name.endswith("e_score_correction_bias")
    }


@pytest.mark.parametrize(
    ("stored", "read"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
)
def test_reading_loses_nothing_unless_told(saved: Path, stored: torch.dtype, read: torch.dtype) -> None:
    change_weights(saved, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    model, tensors = read_checkpoint(saved), weights_of(saved)
    assert {parameter.dtype for parameter in model.parameters()} == {read}
    for tensor in hf_tensors(WITH_MTP):
        assert torch.equal(
            tensor.pack(model.state_dict()), tensors[tensor.name].to(model.state_dict()[tensor.parts[0].name].dtype)
        )


def test_one_wide_tensor_makes_all_wide(saved: Path) -> None:
    change_weights(
        saved, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "norm" not in n})
    )
    assert read_checkpoint(saved).lm_head.weight.dtype == torch.float32
    assert read_checkpoint(saved, torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_another_process_that_saves_there_first(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just before the new folder takes its place."""
    model, target, replace = read_checkpoint(saved), tmp_path / "new", os.replace

    def late(old: Path, new: Path) -> None:
        if Path(new) == target:
            shutil.copytree(saved, target)
        replace(old, new)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(UserError, match=r"cannot be written. Got: Directory not empty"):
        write_checkpoint(model, target)
    assert {path.name for path in tmp_path.iterdir()} == {saved.name, target.name}
    assert (target / files.SINGLE).read_bytes() == (saved / files.SINGLE).read_bytes()


# What lies beside the weights


class TwoFiles:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text("{}")


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    config = tiny(num_nextn_predict_layers=1, auto_map={"AutoConfig": "x.Y"}, quantization_config={}, use_cache=True)
    model = Transformer(config, torch.bfloat16)
    model.load_state_dict(filled(WITH_MTP).state_dict())
    save(model, tmp_path / "a", TwoFiles(), {"do_sample": True, "temperature": 0.6})
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (raw["torch_dtype"], raw["num_nextn_predict_layers"], raw["use_cache"]) == ("bfloat16", 1, True)
    assert not raw.keys() & {"auto_map", "quantization_config"}  # they speak of files that are not here
    settings = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6}


def test_an_older_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    save(filled(WITH_MTP), tmp_path / "a", TwoFiles(), shard_bytes=5_000)
    newer = filled(WITH_MTP, seed=1)
    save(newer, tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same(read_checkpoint(tmp_path / "a"), newer)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_link_to_a_folder_stays_a_link(saved: Path) -> None:
    link = saved.parent / "latest"
    link.symlink_to(saved)
    newer = filled(WITH_MTP, seed=1)
    save(newer, link)
    assert link.is_symlink()
    assert_same(read_checkpoint(saved), newer)


def test_saving_into_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(filled(WITH_MTP), ".")
    assert_same(read_checkpoint(tmp_path), filled(WITH_MTP))


def test_nothing_but_a_checkpoint_is_replaced(saved: Path) -> None:
    (saved / "thesis.tex").write_text("years of work")
    (saved / "model.py").mkdir()
    with pytest.raises(UserError, match=r"holds something other than a checkpoint. Got: model.py, thesis.tex"):
        save(filled(WITH_MTP), saved)
    with pytest.raises(UserError, match=r"Got: thesis.tex. .*choose a new folder"):
        save(filled(WITH_MTP), saved / "thesis.tex")
    assert (saved / "thesis.tex").read_text() == "years of work"


# Folders that must be refused


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(**tensors: Tensor) -> Callable[[Path], None]:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda folder: change_weights(folder, lambda present: present.update(named))


def poison(name: str, value: float, count: int) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[1 : count + 1] = value

    return lambda folder: change_weights(folder, change)


EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("lm_head.weight", BIAS), rf"2 missing \({BIAS}, lm_head.weight\)"),
        (put(model__layers__0__bias=torch.ones(1)), r"1 left over \(model.layers.0.bias\)"),
        (put(model__norm__weight=torch.ones(33)), r"1 of another shape \(model.norm.weight is \[33\], not \[32\]\)"),
        (
            poison("lm_head.weight", float("nan"), 3),
            r"lm_head.weight holds numbers that are not finite. Got: 3 of 1,536",
        ),
        (poison(EXPERT, float("inf"), 1), f"{EXPERT} holds numbers that are not finite. Got: 1 of 512"),
        (poison(BIAS, float("-inf"), 2), f"{BIAS} holds numbers that are not finite. Got: 2 of 8"),
        (
            poison("model.layers.2.embed_tokens.weight", 9.0, 4),
            r"is not a copy of model.embed_tokens.weight. Got: 4 of",
        ),
        (
            lambda folder: change_config(folder, hidden_size=64),
            r"of another shape \(model.embed_tokens.weight is \[48, 32\]",
        ),
        (lambda folder: change_config(folder, num_hidden_layers=3, num_nextn_predict_layers=0), "6 left over"),
        (
            lambda folder: change_config(folder, num_nextn_predict_layers=2),
            "42 missing.*not in the checkpoint, or not whole.*without_mtp=True",
        ),
        (
            lambda folder: change_config(folder, num_nextn_predict_layers=0),
            "more MTP modules than config.json announces",
        ),
        (lambda folder: change_config(folder, rope_theta=-1), "rope_theta"),
        (lambda folder: (folder / "config.json").unlink(), r"There is no .*config.json"),
        (lambda folder: (folder / files.SINGLE).unlink(), "holds no weights that can be read"),
        (lambda folder: os.truncate(folder / files.SINGLE, 30_000), "is cut short. Got: 30,000 of"),
    ],
)
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
def test_broken_checkpoints(saved: Path, damage: Callable[[Path], Any], message: str, mapped: bool) -> None:
    damage(saved)
    with pytest.raises(UserError, match=message):
        read_checkpoint(saved, mapped=mapped)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no folder .*deepseek-v3.*has to be downloaded first"):
        read_checkpoint(tmp_path / "deepseek-v3")


def test_weights_that_are_not_finite_can_be_looked_at(saved: Path) -> None:
    for name in ("lm_head.weight", "model.layers.2.shared_head.head.weight"):  # the copy is as broken
        poison(name, float("nan"), 3)(saved)
    assert int(read_checkpoint(saved, check_finite=False).lm_head.weight.isnan().sum()) == 3


def test_mtp_modules_can_be_left_out(saved: Path) -> None:
    model, read = filled(WITH_MTP), read_checkpoint(saved, without_mtp=True)
    assert len(read.mtp) == 0
    assert torch.equal(read.logits(torch.tensor([1, 2, 3])), model.logits(torch.tensor([1, 2, 3])))


# Disks that are full


class FullDisk:
    """A tokenizer for which there is no room."""

    def save(self, folder: Path) -> None:
        with open("/dev/full", "w") as handle:
            handle.write("{}")


class CtrlC:
    def save(self, folder: Path) -> None:
        raise KeyboardInterrupt


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_untouched(saved: Path) -> None:
    assert_same(read_checkpoint(saved), filled(WITH_MTP))
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_full_disk(file: Path, mode: str) -> Any:
        return open("/dev/full" if file.name.startswith("model-00003-") else file, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", on_full_disk, raising=False)
        with pytest.raises(UserError, match=r"The disk is full while writing .*saved"):
            save(filled(WITH_MTP, seed=1), saved, shard_bytes=10_000)
    assert_untouched(saved)
    with pytest.raises(UserError, match=r"The disk is full while writing .*saved"):
        save(filled(WITH_MTP, seed=1), saved, FullDisk())
    assert_untouched(saved)


def test_a_file_size_limit_leaves_the_older_checkpoint(saved: Path) -> None:
    with file_size_limit(20_000), pytest.raises((OSError, UserError)):
        save(filled(WITH_MTP, seed=1), saved)
    assert_untouched(saved)


def test_ctrl_c_while_saving_leaves_the_older_checkpoint(saved: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        save(filled(WITH_MTP, seed=1), saved, CtrlC())
    assert_untouched(saved)
