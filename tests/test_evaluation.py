"""`cavelight eval`: which text is held out, and by whose rules."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cavelight.cli import evaluation
from cavelight.cli.evaluation import data_to_read, held_out_tokens
from cavelight.cli.main import app
from cavelight.data.tokenizer import train_tokenizer
from cavelight.errors import UserError
from cavelight.spec.recipe import Recipe
from cavelight.train.prepare import held_out, read_corpora
from cavelight.train.state import RunFolder

from .reference.tiny import tiny
from .run_models import random_model

TEXTS = [f"{n * n % 97} birds on {n % 7} fences" for n in range(200)]
TOKENIZER = train_tokenizer(TEXTS, 300)


def silent(event: object) -> None:
    pass


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "a.jsonl"


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> RunFolder:
    """A run's folder with its recipe alone."""
    data = {"corpus": str(corpus), "text_key": "body", "held_out_every": 3, "row_length": 64}
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_recipe(Recipe.build({"data": data, "train": {"steps": 1}}))
    return folder


def test_the_corpus_by_its_path_is_divided_as_the_run_divided_it(
    run: RunFolder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    own, _ = held_out(read_corpora(run.read_recipe().data), TOKENIZER, silent)
    for name in (None, str(corpus), "a.jsonl"):
        read = held_out_tokens(run.path, name, TOKENIZER, silent)
        assert read.tokens_N.tolist() == own.tokens_N.tolist()


def test_a_runs_exported_model_is_asked_about_the_runs_text(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.model.mkdir()
    assert data_to_read(run.model, None) == data_to_read(run.path, None) == run.read_recipe().data
    monkeypatch.chdir(run.model)
    assert data_to_read(Path(), None) == run.read_recipe().data


def test_another_text_key(run: RunFolder, tmp_path: Path) -> None:
    other = str(tmp_path / "b.jsonl")
    assert data_to_read(run.path, other).text_key == "body"
    assert data_to_read(run.path, other, "content").text_key == "content"
    assert data_to_read(tmp_path, other).text_key == "text"


def test_needles_are_hidden_in_the_text_that_is_named(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jsonl").write_text('{"content": "a stork"}\n{"content": "a heron"}\n', encoding="utf-8")
    hay: list[str] = []

    def find_needles(model: object, tokenizer: object, text: str, lengths: object, **more: object) -> None:
        hay.append(text)
        raise UserError("enough")

    monkeypatch.setattr(evaluation, "load", lambda *arguments: (random_model(tiny(vocab_size=300)), TOKENIZER))
    monkeypatch.setattr("cavelight.train.needle.find_needles", find_needles)
    words = ["eval", str(run.path), "--needle", "--data", str(tmp_path / "b.jsonl"), "--text-key", "content"]
    assert CliRunner().invoke(app, words).exit_code == 2
    assert hay in (["a stork\n"], ["a heron\n"])


def test_text_keys_of_a_mixture(run: RunFolder, corpus: Path, tmp_path: Path) -> None:
    mixture = [{"corpus": str(corpus), "text_key": "body"}, {"corpus": "stdlib"}]
    run.write_recipe(Recipe.build({"data": {"corpus": mixture, "row_length": 64}, "train": {"steps": 1}}))
    assert data_to_read(run.path, str(corpus)).text_key == "body"
    assert data_to_read(run.path, str(tmp_path / "b.jsonl")).text_key == "text"
