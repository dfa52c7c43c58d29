"""The doctor on tokenizers and chat templates that were broken on purpose."""

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cavelight.data.tokenizer import BOS, CHAT_TEMPLATE, EOS, train_tokenizer
from cavelight.doctor.examine import examine
from cavelight.doctor.tokens import adds_bos

from .patients import not_passed, patient
from .reference.tiny import tiny

TOKENIZER = train_tokenizer([inspect.getsource(textwrap)], 280)
Edit = Callable[[Path], None]


def edit(file: str, **changes: Any) -> Edit:
    """Change keys of one of the folder's JSON files; None removes one."""

    def change(folder: Path) -> None:
        path = folder / file
        content = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")

    return change


def without_pad_token(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink()
    edit("tokenizer_config.json", pad_token=None)(folder)


def doubled_by_tokenizer_json(folder: Path) -> None:
    edit("tokenizer.json", post_processor=BEGINS)(folder)


BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
}
SETTINGS, CONFIG = "tokenizer_config.json", "config.json"

BROKEN: dict[str, tuple[str, str, Edit]] = {
    "BOS by template and setting": ("chat", "warn", edit(SETTINGS, add_bos_token=True)),
    "BOS by template and Llama's class": (
        "chat",
        "warn",
        edit(SETTINGS, add_bos_token=None, tokenizer_class="LlamaTokenizerFast"),
    ),
    "BOS by template and tokenizer.json": ("chat", "warn", doubled_by_tokenizer_json),
    "BOS twice in the template": ("chat", "warn", edit(SETTINGS, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)),
    "template that is none": ("chat", "fail", edit(SETTINGS, chat_template="{% for %}")),
    "template that refuses": ("chat", "fail", edit(SETTINGS, chat_template="{{ raise_exception('never') }}")),
    "pad named as end": ("padding", "warn", edit(SETTINGS, pad_token=EOS)),
    "pad id of the end": ("padding", "warn", edit(CONFIG, pad_token_id=1)),
    "pad id among the ends": ("padding", "warn", edit(CONFIG, pad_token_id=2, eos_token_id=[1, 2])),
    "other end in config.json": ("token-ids", "warn", edit(CONFIG, eos_token_id=3)),
    "other end in generation_config.json": ("token-ids", "warn", edit("generation_config.json", eos_token_id=[3, 4])),
    "other beginning": ("token-ids", "warn", edit(CONFIG, bos_token_id=7)),
    "ids beyond vocab_size": ("token-ids", "fail", edit(CONFIG, vocab_size=5, bos_token_id=0, eos_token_id=1)),
    "generation_config.json broken": ("tokenizer", "fail", lambda f: edit_text(f / "generation_config.json", "{")),
    "tokenizer.json broken": ("tokenizer", "fail", lambda f: edit_text(f / "tokenizer.json", "[]")),
    "end token unknown": ("tokenizer", "fail", edit(SETTINGS, eos_token="<nowhere>")),
}


def edit_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sound(folder: Path, vocab_size: int = 300) -> Path:
    made = patient(tiny(vocab_size=vocab_size, pad_token_id=2)).write(folder / "model")
    TOKENIZER.save(made)
    return made


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, tmp_path: Path) -> None:
    check, verdict, break_it = BROKEN[name]
    folder = sound(tmp_path)
    break_it(folder)
    found = {finding.check: finding for finding in not_passed(examine(folder, "headers"))}
    assert check in found, found
    assert found[check].verdict == verdict and found[check].trap in (10, None), found[check]


def test_the_same_unbroken(tmp_path: Path) -> None:
    findings = examine(sound(tmp_path), "headers")
    assert not_passed(findings) == []
    assert {"vocabulary", "token-ids", "padding", "chat"} <= {finding.check for finding in findings}


def test_a_pad_token_that_nobody_named_is_no_matter(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    without_pad_token(folder)
    edit(CONFIG, pad_token_id=None)(folder)
    assert not_passed(examine(folder, "headers")) == []


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(279, "fail"), (280, None), (300, None), (1303, None), (1500, "warn")]
)
def test_the_vocabulary_has_to_fit(vocab_size: int, expected: str | None, tmp_path: Path) -> None:
    """Rows that pad the embedding are usual, ids without a row fatal."""
    found = {f.check: f.verdict for f in not_passed(examine(sound(tmp_path, vocab_size), "headers"))}
    assert found == ({"vocabulary": expected} if expected else {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("post_processor", [None, BEGINS], ids=["plain", "with BOS"])
def test_what_the_tokenizer_adds_is_what_transformers_adds(
    post_processor: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = sound(tmp_path)
    edit("tokenizer.json", post_processor=post_processor)(folder)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert adds_bos(definition, settings) == (theirs("text")["input_ids"][:1] == [0])


def test_a_base_model_needs_no_template(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    edit(SETTINGS, chat_template=None)(folder)
    findings = examine(folder, "headers")
    assert not_passed(findings) == [] and "no chat template" in {f.check: f.sentence for f in findings}["chat"]
    (folder / "chat_template.jinja").write_text("{{ bos_token * 2 }}{{ messages[0]['content'] }}", encoding="utf-8")
    assert [finding.check for finding in not_passed(examine(folder, "headers"))] == ["chat"]


def test_a_template_of_null_is_none(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) | {"chat_template": None}
    edit_text(folder / SETTINGS, json.dumps(settings))
    assert not_passed(examine(folder, "headers")) == []


def test_what_the_template_writes_twice_is_taken_out_of_it(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    edit(SETTINGS, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)(folder)
    (found,) = not_passed(examine(folder, "headers"))
    assert found.sentence.endswith("take one out of the template.") and "add_bos_token" not in found.sentence


@pytest.mark.parametrize("value", [-1, 1e400, "x", [[]], {"a": 1}, True], ids=repr)
def test_ids_of_any_kind_are_survived(value: object, tmp_path: Path) -> None:
    folder = sound(tmp_path)
    for file in (CONFIG, "generation_config.json"):
        edit(file, bos_token_id=value, eos_token_id=value, pad_token_id=value)(folder)
    assert {"padding", "token-ids", "chat"} <= {finding.check for finding in examine(folder, "headers")}
