"""From a recipe to tokens: mixtures, what is held out of them, and a tokenizer from a bounded sample."""

import json
from pathlib import Path

import pytest

from cavelight.data.corpus import read_corpus
from cavelight.data.tokenizer import FIM_BEGIN
from cavelight.errors import UserError
from cavelight.spec.events import Event, Note, Phase
from cavelight.spec.recipe import Recipe
from cavelight.train import prepare as preparing
from cavelight.train.prepare import Prepared, prepare, read_corpora


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A recipe of two sources in different formats, with a cache of its own."""
    monkeypatch.setenv("CAVELIGHT_CACHE", str(tmp_path / "cache"))
    words = "alpha beta gamma delta epsilon zeta eta theta".split()  # noqa: SIM905  (as one reads it)
    lines = [json.dumps({"body": " ".join(words[n % 5 :]) + f" {n}"}) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b").mkdir()
    for number in range(60):
        (tmp_path / "b" / f"{number}.txt").write_text(f"def f{number}():\n    return {number}\n" * 5)
    sources = [
        {"corpus": str(tmp_path / "a.jsonl"), "weight": 3, "text_key": "body"},
        {"corpus": str(tmp_path / "b")},
    ]
    return {
        "model": {"preset": "nano", "overrides": {"vocab_size": 300}},
        "data": {"corpus": sources, "fim_rate": 0.5, "split_line_ends": 0.5, "row_length": 32},
        "train": {"steps": 1},
    }


def prepared(values: dict[str, object], *changes: str) -> tuple[Prepared, list[Event]]:
    heard: list[Event] = []
    return prepare(Recipe.build(values, changes), heard.append), heard


def test_a_mixture_is_prepared(mixture: dict[str, object]) -> None:
    data, heard = prepared(mixture)
    assert data.train.weights == (3.0, 1.0) and len(data.train.stores) == 2
    assert [Path(name).name for name in data.held_of] == ["a.jsonl", "b"]
    assert sum(map(len, data.held_of.values())) == len(data.held) > 0
    whole = data.tokenizer.decode(data.held.tokens_N.tolist())
    assert whole == "".join(data.tokenizer.decode(store.tokens_N.tolist()) for store in data.held_of.values())
    begin = data.tokenizer.control[FIM_BEGIN]
    assert begin not in data.held.tokens_N and all(begin in store.tokens_N for store in data.train.stores)
    assert sum(isinstance(event, Note) for event in heard) == 3 and any(isinstance(event, Phase) for event in heard)
    again, heard = prepared(mixture)
    assert not any(isinstance(event, Phase) for event in heard)  # all of it was kept
    assert again.held.tokens_N.tolist() == data.held.tokens_N.tolist()
    more, _ = prepared(mixture, "data.held_out_every=3")
    assert len(more.held) == sum(map(len, more.held_of.values())) > 2 * len(data.held)


def test_held_out_text_is_no_other_text(mixture: dict[str, object]) -> None:
    for corpus in read_corpora(Recipe.build(mixture).data).values():
        assert not {document.name for document in corpus.train} & {document.name for document in corpus.held}


def test_the_same_corpus_twice_keeps_two_names(mixture: dict[str, object], tmp_path: Path) -> None:
    same = {"corpus": str(tmp_path / "b")}
    recipe = Recipe.build({**mixture, "data": {"corpus": [same, same]}, "train": {"steps": 1}})
    assert list(read_corpora(recipe.data)) == [str(tmp_path / "b"), f"{tmp_path / 'b'} (2)"]


def test_held_out_text_of_one_source_in_another_is_said(
    mixture: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(*specs: Path) -> bool:
        caplog.clear()
        data = {"corpus": [{"corpus": str(spec), "text_key": "body"} for spec in specs]}
        read_corpora(Recipe.build({**mixture, "data": data}).data)
        return "hold out different parts" in caplog.text

    assert not warned(tmp_path / "a.jsonl", tmp_path / "b")
    assert not warned(tmp_path / "b", tmp_path / "b")
    assert not warned(tmp_path / "b", tmp_path / "b" / "1*.txt")  # the same names
    assert not warned(tmp_path / "a.jsonl", tmp_path)
    assert warned(tmp_path, tmp_path / "b")  # b/1.txt, and 1.txt
    assert warned(tmp_path / "b", tmp_path / "b" / "1.txt")  # whole, and in cuts


def test_extreme_weights(mixture: dict[str, object]) -> None:
    sources = mixture["data"]["corpus"]  # type: ignore[index]
    sources[0]["weight"], sources[1]["weight"] = 1e300, 1e-300
    data, _ = prepared(mixture)
    assert data.train.weights == (1e300, 1e-300)


def test_the_tokenizer_reads_a_bounded_sample_from_all_over(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} " * 50)
    part = read_corpus(str(tmp_path)).train
    sample = list(preparing._sample(part, part.size // 10))
    assert 8 <= len(sample) <= 11 and sample == list(preparing._sample(part, part.size // 10))
    numbers = [int(text.split()[0]) for text in sample]
    assert min(numbers) < 15 and max(numbers) > 85
    assert len(list(preparing._sample(part, part.size))) == len(list(part))


def test_a_tokenizer_that_is_too_large(mixture: dict[str, object], tmp_path: Path) -> None:
    data, _ = prepared(mixture)
    data.tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="300 tokens for a vocab_size of 290"):
        prepared(mixture, f"data.tokenizer={tmp_path / 'tokenizer'}", "model.vocab_size=290")
