"""Runs that meet a spike of the loss, or a gradient that is not finite."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cavelight.data.batches import Batch, Batches
from cavelight.errors import UserError
from cavelight.spec.events import Event, Note, Step
from cavelight.spec.recipe import Recipe
from cavelight.train import loop, step
from cavelight.train.checkpoints import saved_steps
from cavelight.train.state import RunFolder

from .runs import Crash, assert_same, changed, corpus, lines, recipe

__all__ = ["corpus", "recipe"]  # fixtures


def poison(which: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch, loss: float = math.nan) -> None:
    """Steps that read a row with such a number lose their way, whenever they read it."""
    rows, train_step = Batches.rows, step.train_step

    def marked(self: Batches, first: int, number: int) -> Batch:
        batch = rows(self, first, number)
        return replace(batch, positions_T=batch.positions_T + 1000 * which(first))

    def spoilt(model: Any, optimizer: Any, batches: Any, *arguments: Any, **more: Any) -> step.StepResult:
        bad = any(int(batch.positions_T[0]) for batch in batches)
        batches = [replace(batch, positions_T=batch.positions_T % 1000) for batch in batches]
        accept = more.pop("accept")
        more["accept"] = lambda loss, norm: not bad and accept(loss, norm)
        result = train_step(model, optimizer, batches, *arguments, **more)
        return replace(result, loss=loss) if bad else result

    monkeypatch.setattr(Batches, "rows", marked)
    monkeypatch.setattr(loop, "train_step", spoilt)


def test_a_spike_leads_back_past_its_rows_and_a_kill_changes_nothing_of_that(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, on_spike="back")
    poison(lambda first: first in (10, 22), monkeypatch)  # rows of steps 3 and, after the way back, 5
    heard: list[Event] = []
    result = loop.train(recipe, tmp_path / "whole", heard.append)
    assert result.steps == 6
    assert [event.step for event in heard if isinstance(event, Step)] == [1, 2, 3, 3, 4, 5, 5, 6]
    told = lines(tmp_path / "whole")
    assert [line["step"] for line in told if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    spikes = [line for line in told if line["kind"] == "spike"]
    assert [(line["step"], line["back_to"], line["first_row"]) for line in spikes] == [(3, 2, 8), (5, 4, 20)]
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert sum("back to step" in note for note in notes) == 2
    for steps in (4, 5):
        with monkeypatch.context() as patched:
            train_step, calls = loop.train_step, count(1)

            def dying(*arguments: Any, **more: Any) -> step.StepResult:
                if next(calls) > steps:  # noqa: B023 called within this round only
                    raise Crash
                return train_step(*arguments, **more)  # noqa: B023

            patched.setattr(loop, "train_step", dying)
            with pytest.raises(Crash):
                loop.train(recipe, tmp_path / "killed", resume=(tmp_path / "killed").exists())
    loop.train(recipe, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_second_way_back_to_the_same_save_keeps_what_was_told_of_the_first(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(lambda first: first in (10, 14), monkeypatch)
    loop.train(changed(recipe, on_spike="back"), tmp_path / "run")
    spikes = [line for line in lines(tmp_path / "run") if line["kind"] == "spike"]
    assert [(line["step"], line["back_to"], line["first_row"]) for line in spikes] == [(3, 2, 8), (3, 2, 12)]


def test_spikes_without_end_end_the_run_instead(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_LEFT_OUT", 3)
    poison(lambda first: first >= 12, monkeypatch)
    for on_spike, steps in (("skip", [4, 5, 6]), ("back", [4, 4, 4])):
        heard: list[Event] = []
        with pytest.raises(UserError, match="3 steps in a row"):
            loop.train(changed(recipe, on_spike=on_spike, save_every=3), tmp_path / on_spike, heard.append)
        assert [event.step for event in heard if isinstance(event, Step) and event.skipped] == steps
        assert saved_steps(RunFolder(tmp_path / on_spike).saves) == [3]


@pytest.mark.parametrize(("on_spike", "left_out"), [("skip", [4]), ("nothing", [])])
def test_a_loss_far_above_the_others_is_left_out_if_the_recipe_says_so(
    on_spike: str, left_out: list[int], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cavelight.train.spikes.FEWEST", 3)
    losses = iter((6.0, 6.2, 6.1, 100.0, 6.1, 6.0))

    def told_otherwise(*arguments: Any, accept: Callable[[float, float], bool], **more: Any) -> step.StepResult:
        loss = next(losses)
        result = step.train_step(*arguments, accept=lambda _, norm: accept(loss, norm), **more)
        return replace(result, loss=loss)

    monkeypatch.setattr(loop, "train_step", told_otherwise)
    loop.train(changed(recipe, on_spike=on_spike), tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "step" and line["skipped"]] == left_out
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "spike"] == left_out


def test_a_gradient_that_is_not_finite_changes_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(lambda first: first >= 12, monkeypatch)
    loop.train(changed(recipe, steps=5, ema_decay=0.9), tmp_path / "run")
    loop.train(changed(recipe, steps=3, ema_decay=0.9), tmp_path / "short")
    for folder in ("model", "model-ema"):
        weights = [(tmp_path / run / folder / "model.safetensors").read_bytes() for run in ("run", "short")]
        assert weights[0] == weights[1]
