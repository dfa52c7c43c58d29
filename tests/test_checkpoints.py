"""Saves: whole or not at all, verified when read, pruned by the rule, written beside the training."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cavelight.errors import UserError
from cavelight.train import checkpoints
from cavelight.train.checkpoints import (
    DamagedError,
    Saver,
    Snapshot,
    folder_of,
    prune,
    read_newest,
    read_save,
    saved_steps,
    sweep,
    write_save,
)

WEIGHTS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3).T.contiguous(),
    "narrow": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.25),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "none": torch.empty(0, 4),
}
VALUES = {"progress": {"seconds": 0.1 + 0.2, "ceiling": float("inf")}, "list": [1, None, "ä"]}


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"weights": WEIGHTS, "optimizer": {"step": torch.tensor(float(step))}}, VALUES)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """To the bit, where NaN equals itself."""
    bits = [tensor.contiguous().flatten().view(torch.uint8).tolist() for tensor in (ours, theirs)]
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and bits[0] == bits[1]


def full(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this name lie on /dev/full, a device that is always full."""

    def opened(path: Path, mode: str = "r", **more: Any) -> Any:
        return open("/dev/full" if Path(path).name == file else path, mode, **more)

    monkeypatch.setattr(checkpoints, "open", opened, raising=False)


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path: Path) -> None:
    write_save(tmp_path, snapshot(500))
    read = read_save(folder_of(tmp_path, 500))
    assert read.step == 500 and read.values == VALUES
    assert read.tensors.keys() == {"weights", "optimizer"} and read.tensors["weights"].keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert same(read.tensors["weights"][name], tensor), name


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    write_save(tmp_path, snapshot(1))
    theirs = load_file(folder_of(tmp_path, 1) / "weights.safetensors")
    assert all(same(theirs[name], tensor) for name, tensor in WEIGHTS.items()) and theirs.keys() == WEIGHTS.keys()


def test_what_was_read_outlives_its_files(tmp_path: Path) -> None:
    """A mapped file that is written anew would change the optimizer under the training's feet."""
    write_save(tmp_path, snapshot(1))
    read = read_save(folder_of(tmp_path, 1))
    for file in folder_of(tmp_path, 1).iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    assert same(read.tensors["weights"]["matrix"], WEIGHTS["matrix"])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
def test_any_damage_is_noticed_and_the_save_before_is_used(
    name: str, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    write_save(tmp_path, snapshot(1))
    write_save(tmp_path, snapshot(2))
    harm(folder_of(tmp_path, 2) / name)
    with pytest.raises(DamagedError):
        read_save(folder_of(tmp_path, 2))
    said: list[str] = []
    read = read_newest(tmp_path, said.append)
    assert read is not None and read.step == 1
    assert len(said) == 1 and "step-00000002 is damaged" in said[0]
    harm(folder_of(tmp_path, 1) / name)
    with pytest.raises(UserError, match=r"No save .* is whole"):
        read_newest(tmp_path, said.append)


def test_without_saves_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "saves", pytest.fail) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_what_stood_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_save(tmp_path, snapshot(1))
    with monkeypatch.context() as patched:
        full(name, patched)
        with pytest.raises(UserError, match="disk is full"):
            write_save(tmp_path, snapshot(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_save(folder_of(tmp_path, 1)).step == 1


def test_the_newest_saves_stay_and_multiples_and_nothing_from_a_future_that_did_not_come(tmp_path: Path) -> None:
    for step in (100, 150, 200, 250, 300, 350, 900):
        write_save(tmp_path, snapshot(step))
    prune(tmp_path, step=350, keep=2, keep_every=100)
    assert saved_steps(tmp_path) == [100, 200, 300, 350]
    prune(tmp_path, step=350, keep=1, keep_every=None)
    assert saved_steps(tmp_path) == [350]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_kill_left_half_done_is_removed_or_put_back(tmp_path: Path) -> None:
    write_save(tmp_path, snapshot(1))
    (tmp_path / ".step-00000002.77.part").mkdir()
    (tmp_path / ".step-00000002.77.part" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".recipe.json.77.part").write_bytes(b"{")
    (tmp_path / ".step-00000001.77.old").mkdir()  # its successor is there
    (tmp_path / ".model.77.old").mkdir()  # killed between two renames: the successor is not
    (tmp_path / ".model.77.old" / "config.json").write_text("{}")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "step-00000001"]
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    assert read_save(folder_of(tmp_path, 1)).step == 1


def test_what_others_left_in_the_folder_stays(tmp_path: Path) -> None:
    """Whoever trains into a folder of their own would otherwise lose ~/.config.old."""
    (tmp_path / ".config.old").mkdir()
    (tmp_path / ".config.old" / "precious").write_text("x")
    for name in (".vimrc.old", ".song.part", "film.part"):
        (tmp_path / name).write_text("half a song")
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_somebody_renamed_is_none(tmp_path: Path) -> None:
    write_save(tmp_path, snapshot(1))
    folder_of(tmp_path, 1).rename(tmp_path / "step-00000001.bak")
    assert saved_steps(tmp_path) == []


def test_empty_checksums_vouch_for_nothing(tmp_path: Path) -> None:
    write_save(tmp_path, snapshot(1))
    (folder_of(tmp_path, 1) / "checksums.json").write_text("{}")
    with pytest.raises(DamagedError):
        read_save(folder_of(tmp_path, 1))


def test_writing_goes_on_beside_and_is_collected_once() -> None:
    go, saver = threading.Event(), Saver()
    saver.begin(lambda: None if go.wait(10) else pytest.fail("nobody said go"))
    assert not saver.collect(wait=False)
    go.set()
    assert saver.collect(wait=True)
    assert not saver.collect(wait=True)


def test_what_keeps_a_save_from_standing_is_told_to_whoever_collects() -> None:
    def write() -> None:
        raise UserError("The disk is full")

    saver = Saver()
    saver.begin(write)
    with pytest.raises(UserError, match="disk is full"):
        saver.collect(wait=True)
    saver.begin(lambda: None)  # and the next attempt is free to be made
    assert saver.collect(wait=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_is_not_taken_for_a_save() -> None:
    def write() -> None:
        raise OSError(errno.EIO, "Input/output error")

    saver = Saver()
    saver.begin(write)
    with pytest.raises(RuntimeError, match="traceback"):
        saver.collect(wait=True)
