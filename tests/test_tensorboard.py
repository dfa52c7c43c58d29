"""TensorBoard gets the values of the log. The package is optional: a writer that only listens stands in for its own."""

import errno
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cavelight.errors import UserError
from cavelight.spec.events import Event, Note
from cavelight.spec.recipe import Recipe
from cavelight.train import loop
from cavelight.train.state import RunFolder

from .runs import changed, corpus, lines, recipe

__all__ = ["corpus", "recipe"]  # fixtures

MODULE = "torch.utils.tensorboard"


class Writer:
    """Takes what SummaryWriter takes."""

    made: "list[Writer]" = []  # noqa: RUF012 emptied by each test

    def __init__(self, log_dir: Path, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = log_dir, purge_step, False
        self.scalars: dict[tuple[str, int], float] = {}
        self.texts: dict[int, str] = {}
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts[step] = text

    def close(self) -> None:
        self.closed = True


def test_its_values_are_the_logs(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType(MODULE)
    module.SummaryWriter = Writer
    Writer.made = []
    monkeypatch.setitem(sys.modules, MODULE, module)
    recipe = changed(recipe, tensorboard=True, steps=3)
    loop.train(recipe, tmp_path)
    loop.train(changed(recipe, steps=4), tmp_path, resume=True)
    first, second = Writer.made
    assert first.folder == RunFolder(tmp_path).tensorboard
    assert (first.purge_step, second.purge_step) == (1, 4) and first.closed and second.closed
    scalars, told = first.scalars | second.scalars, lines(tmp_path)
    for line in told:
        if line["kind"] == "step":
            at = line["step"]
            assert scalars["loss/next token", at] == line["loss"]
            assert scalars["loss/MTP 1", at] == line["mtp_losses"][0]
            assert scalars["optimizer/gradient norm", at] == line["grad_norm"]
            assert scalars["MaxVio/2", at] == line["max_vio"][1]
            assert scalars["bias range/1", at] == line["bias_range"][0]
        if line["kind"] == "evaluated" and line["whole"]:
            assert scalars["bits per byte/all of it", line["step"]] == line["bits_per_byte"]
        if line["kind"] == "sampled":
            assert line["text"] in (first.texts | second.texts)[line["step"]]


def test_a_full_disk_silences_it_and_not_the_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Writer, tag: str, value: float, step: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module: Any = ModuleType(MODULE)
    module.SummaryWriter = type("Full", (Writer,), {"add_scalar": full})
    monkeypatch.setitem(sys.modules, MODULE, module)
    heard: list[Event] = []
    assert loop.train(changed(recipe, tensorboard=True, steps=3), tmp_path, heard.append).steps == 3
    assert sum(isinstance(event, Note) and "TensorBoard hears no more" in event.text for event in heard) == 1


def test_without_the_package_a_sentence_says_so(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        loop.train(changed(recipe, tensorboard=True), tmp_path)
