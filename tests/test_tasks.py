"""`cavelight eval --tasks` where nothing has to be computed: what is wrong is said before the model is read."""

import sys
from pathlib import Path

import pytest

import cavelight
from cavelight.cli.tasks import tasks
from cavelight.errors import UserError


def call(names: list[str], limit: int | None = None, shots: int | None = None) -> None:
    tasks(Path("nowhere"), names, limit, None, shots, "auto", False, True)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "cavelight.harness", raising=False)
    monkeypatch.delattr(cavelight, "harness", raising=False)
    with pytest.raises(UserError, match=r"Tasks need lm-evaluation-harness.*pip install 'cavelight\[eval\]'"):
        call(["arc_easy"])


@pytest.mark.parametrize(
    ("names", "limit", "shots", "message"),
    [
        (["", " "], None, None, "No task is named"),
        (["arc_easy"], 0, None, "limit of documents"),
        (["arc_easy"], 5, -1, "worked examples"),
    ],
)
def test_mistakes(names: list[str], limit: int | None, shots: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(names, limit, shots)
