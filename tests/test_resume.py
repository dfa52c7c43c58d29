"""Runs that are killed and go on."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cavelight.errors import UserError
from cavelight.spec.events import Event, Note, Step
from cavelight.spec.recipe import Recipe
from cavelight.train import loop, step
from cavelight.train.checkpoints import folder_of, saved_steps
from cavelight.train.prepare import prepare
from cavelight.train.state import Progress, RunFolder, check_same_data, fingerprint

from .runs import Crash, assert_same, changed, corpus, crash_after, lines, recipe

__all__ = ["corpus", "recipe"]  # fixtures


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "float32", "ema_decay": 0.9, "ramp_from_rows": 2, "ramp_share": 0.9},
        {"dtype": "bfloat16", "optimizer": "muon"},
        {"moments": "bfloat16", "recompute": "selective", "rows_per_microbatch": 1},
        {"moments": "bfloat16", "recompute": "full", "fp8": True, "optimizer": "muon", "ema_decay": 0.9},
        {"moments": "bfloat16", "dtype": "bfloat16", "recompute": "selective", "rows_per_microbatch": 4},
    ],
    ids=["adamw", "muon", "selective", "fp8", "bfloat16"],
)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(
    recipe: Recipe, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole, killed = changed(recipe, **keys), tmp_path / "whole", tmp_path / "killed"
    loop.train(recipe, whole)
    for steps, resume in ((1, False), (3, True), (2, True)):  # before the first save, after the first and second
        with monkeypatch.context() as patched:
            crash_after(steps, patched)
            with pytest.raises(Crash):
                loop.train(recipe, killed, resume=resume)
    result = loop.train(recipe, killed, resume=True)
    assert result.steps == 6 and not result.interrupted
    assert_same(whole, killed)
    assert [line["step"] for line in lines(whole) if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    again = loop.train(recipe, killed, resume=True)  # a finished run is evaluated again and told the same
    assert again.bits_per_byte == result.bits_per_byte
    assert_same(whole, killed)


def test_an_average_that_is_kept_no_more_leaves_no_export(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    loop.train(changed(recipe, steps=3, ema_decay=0.9), folder.path)
    assert folder.average.is_dir()
    loop.train(changed(recipe, steps=4), folder.path, resume=True)
    assert folder.model.is_dir() and not folder.average.exists()


def test_random_numbers_drawn_in_training_go_on_too_and_the_callers_are_left_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def train_step(*arguments: Any, **more: Any) -> step.StepResult:
        drawn.append(float(torch.rand(())))
        return step.train_step(*arguments, **more)

    monkeypatch.setattr(loop, "train_step", train_step)
    before = torch.get_rng_state()
    loop.train(changed(recipe, steps=3), tmp_path / "run")
    loop.train(changed(recipe, steps=5), tmp_path / "run", resume=True)
    assert torch.equal(before, torch.get_rng_state())
    loop.train(changed(recipe, steps=5), tmp_path / "whole")
    assert len(set(drawn)) == 5 and drawn[:5] == drawn[5:]


def test_a_newest_save_that_is_damaged_is_told_and_the_one_before_used(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    saves = RunFolder(tmp_path / "run").saves
    assert saved_steps(saves) == [4, 6]
    os.truncate(folder_of(saves, 6) / "optimizer.safetensors", 1000)
    heard: list[Event] = []
    loop.train(recipe, tmp_path / "run", heard.append, resume=True)
    assert any(isinstance(event, Note) and "step-00000006 is damaged" in event.text for event in heard)
    assert [event.step for event in heard if isinstance(event, Step)] == [5, 6]
    assert_same(tmp_path / "whole", tmp_path / "run")
    for step_ in (4, 6):
        (folder_of(saves, step_) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="is whole"):
        loop.train(recipe, tmp_path / "run", resume=True)


def test_a_log_that_was_shortened_is_told(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path / "run")
    file = RunFolder(tmp_path / "run").metrics
    os.truncate(file, file.stat().st_size // 2)
    heard: list[Event] = []
    loop.train(changed(recipe, steps=7), tmp_path / "run", heard.append, resume=True)
    assert any(isinstance(event, Note) and "shortened" in event.text for event in heard)
    steps = [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "step"]
    assert steps[-1] == 7 and 6 not in steps


def test_resuming_takes_new_rates_but_no_other_model_or_data(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path / "run")
    stored = recipe.model_dump()
    for change in ("model.hidden_size=64", "data.row_length=8", "train.seed=3", "train.optimizer=muon"):
        with pytest.raises(UserError, match=change.partition("=")[0].split(".")[0]):
            loop.train(Recipe.build(stored, [change]), tmp_path / "run", resume=True)
    more = [
        "train.steps=7",
        "train.weight_decay=0.5",
        "train.beta2=0.9",
        "train.rows_per_step=2",
        "train.ema_decay=0.5",
    ]
    assert loop.train(Recipe.build(stored, more), tmp_path / "run", resume=True).steps == 7
    told = lines(tmp_path / "run")
    assert [line["step"] for line in told if line["kind"] == "step"] == list(range(1, 8))
    assert [line["rows"] for line in told if line["kind"] == "step"] == [4] * 6 + [2]
    assert sum(line.get("whole", False) for line in told) == 1
    assert RunFolder(tmp_path / "run").average.is_dir()


def test_a_run_goes_on_with_moments_in_other_numbers_and_back(recipe: Recipe, tmp_path: Path) -> None:
    """Widened they lose nothing; rounded they are what is saved from then on."""
    loop.train(changed(recipe, steps=2), tmp_path / "run")
    kept = []
    for steps, kind in ((3, "bfloat16"), (4, "float32")):
        loop.train(changed(recipe, steps=steps, moments=kind), tmp_path / "run", resume=True)
        saved = load_file(folder_of(RunFolder(tmp_path / "run").saves, steps) / "optimizer.safetensors")
        kept.append({tensor.dtype for name, tensor in saved.items() if "exp_avg" in name})
    assert kept == [{torch.bfloat16}, {torch.float32}]
    losses = [line["loss"] for line in lines(tmp_path / "run") if line["kind"] == "step"]
    loop.train(changed(recipe, steps=4), tmp_path / "whole")
    told = [line["loss"] for line in lines(tmp_path / "whole") if line["kind"] == "step"]
    assert losses[:3] == told[:3] and losses[3] == pytest.approx(told[3], rel=1e-3) and losses[3] != told[3]


@pytest.mark.parametrize("own", [False, True], ids=["tokenizer of the corpus", "tokenizer given"])
def test_a_corpus_that_has_changed_is_told(recipe: Recipe, own: bool, corpus: Path, tmp_path: Path) -> None:
    """Row numbers, and ids of a tokenizer that is trained anew, would silently mean other text."""
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    loop.train(changed(recipe, steps=2), tmp_path / "first")
    recipe = Recipe.build(recipe.model_dump(), [f"data.corpus={texts}"])
    if own:
        recipe = Recipe.build(recipe.model_dump(), [f"data.tokenizer={tmp_path / 'first' / 'model'}"])
    loop.train(changed(recipe, steps=2), tmp_path / "run")
    loop.train(changed(recipe, steps=3), tmp_path / "run", resume=True)
    (texts / "1.txt").write_text("something else\n" * 40)
    with pytest.raises(UserError, match="not the one that the run began with"):
        loop.train(changed(recipe, steps=4), tmp_path / "run", resume=True)
    assert saved_steps(RunFolder(tmp_path / "run").saves) == [2, 3]


def test_a_text_of_the_same_lengths_is_told_apart(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    """By the stores' checksums; a save of an earlier version knows lengths alone and is taken."""
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    loop.train(changed(recipe, steps=2), tmp_path / "first")
    changes = [f"data.corpus={texts}", f"data.tokenizer={tmp_path / 'first' / 'model'}"]
    recipe = Recipe.build(recipe.model_dump(), [*changes, "data.fim_rate=0.0", "data.split_line_ends=0.0"])
    before = prepare(recipe, lambda event: None)
    text = (texts / "1.txt").read_text()
    (texts / "1.txt").write_text("\n".join(reversed(text.split("\n"))))
    after = prepare(recipe, lambda event: None)
    early = fingerprint(before, with_checksums=False)
    assert early == fingerprint(after, with_checksums=False)
    check_same_data(Progress(data=fingerprint(before)), before)
    check_same_data(Progress(data=early), before)
    with pytest.raises(UserError, match="not the one that the run began with"):
        check_same_data(Progress(data=fingerprint(before)), after)


def test_two_processes_do_not_train_in_one_folder(recipe: Recipe, tmp_path: Path) -> None:
    with RunFolder(tmp_path).held(), pytest.raises(UserError, match="Another process"):
        loop.train(recipe, tmp_path)


def test_a_run_begins_with_given_weights(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path / "first")
    first = RunFolder(tmp_path / "first").model
    still = ["train.steps=1", "train.learning_rate=1e-30", "train.bias_speed=0", "train.embedding_rate=1"]
    values = recipe.model_dump() | {"model": {"weights": str(tmp_path / "first")}}
    values["data"] |= {"tokenizer": str(first)}
    loop.train(Recipe.build(values, still), tmp_path / "second")
    second = RunFolder(tmp_path / "second").model
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="do not fit"):
        loop.train(Recipe.build(values, ["model.num_hidden_layers=3"]), tmp_path / "third")
