"""Needles: the text that teaches finding, haystacks, and whether what is found and lost is told apart."""

import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cavelight.cli.evaluation import report_needles, steps_to
from cavelight.data.needles import BEGINNING, LINE_TOKENS, NAMES, corpus, facts, filler, stream, without_facts
from cavelight.data.tokenizer import Tokenizer, train_tokenizer
from cavelight.errors import UserError
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.run.cache import CachedAttend, LatentCache
from cavelight.run.rows import CacheDtype
from cavelight.spec.config import ModelConfig
from cavelight.train import passage
from cavelight.train.needle import find_needles, haystack, plain_text
from cavelight.train.passage import hidden_of, tokens_at_once

from .reference.tiny import tiny
from .run_models import random_model

TEXT = "".join(islice(stream(Random(3), 512), 2000))
TOKENIZER: Tokenizer = train_tokenizer([TEXT], 600)


def config(reach: int = 4096) -> ModelConfig:
    return tiny(vocab_size=600, max_position_embeddings=reach)


class Reader:
    """Goes on after a question as the last line with its name went on, if that lies within `sight` tokens."""

    def __init__(self, sight: int, reach: int = 4096) -> None:
        self.config, self.sight = config(reach), sight
        self.lm_head = torch.nn.Linear(1, 1)
        self.seen = [0] * reach

    def __call__(
        self, tokens_T: Tensor, positions_T: Tensor, attend: CachedAttend, dispatch: object
    ) -> tuple[Tensor, Any]:
        self.seen[attend.start : attend.start + len(tokens_T)] = tokens_T.tolist()
        assert positions_T.tolist() == list(range(attend.start, attend.start + len(tokens_T)))
        return positions_T[:, None].float(), []

    def head(self, hidden_TD: Tensor) -> Tensor:
        place = int(hidden_TD[-1, 0]) + 1
        before = TOKENIZER.decode(self.seen[max(place - self.sight, 0) : place])
        asked = before[before.rindex(BEGINNING) :]
        found = before.find(asked, 0, len(before) - 1)
        rest = before[found + len(asked) :] if found + len(asked) < len(before) else "?"
        return torch.nn.functional.one_hot(torch.tensor([TOKENIZER.encode(rest)[0]]), 600).float()


def test_a_stream_restates_facts_within_a_context_and_renames_none_within_one() -> None:
    for context in (64, 2048, 32_768):
        lines = list(islice(stream(Random(context), context), 6 * context // 7))
        reach, gaps = context / LINE_TOKENS, list[int]()
        stated, codes = dict[str, int](), dict[str, list[str]]()
        for number, line in enumerate(lines):
            if line.startswith(BEGINNING):
                _, _, name, *code = line.split()
                if codes.get(name) == code and number - stated[name] <= 2 * reach:
                    gaps.append(number - stated[name])
                else:
                    assert number - stated.get(name, -context) >= reach, f"{name} has two codes within a context"
                stated[name], codes[name] = number, code
        assert len(gaps) > 20
        assert max(gaps) > 0.8 * reach
        assert min(gaps) <= 2


def test_the_same_seed_tells_the_same_story() -> None:
    assert list(islice(stream(Random(1), 99), 50)) == list(islice(stream(Random(1), 99), 50))
    assert list(islice(stream(Random(1), 99), 50)) != list(islice(stream(Random(2), 99), 50))


def test_a_corpus_is_written_once(tmp_path: Path) -> None:
    folder = corpus(tmp_path, 64)
    files = sorted(folder.iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    assert len({file.read_text(encoding="utf-8")[:500] for file in files}) == len(files) > 10
    assert corpus(tmp_path, 64) == folder
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_haystack_holds_each_needle_at_its_depth_between_whole_lines() -> None:
    hidden = facts(Random(0), 12)
    hay = TOKENIZER.encode(without_facts(TEXT))
    for seed in range(5):
        tokens = haystack(TOKENIZER, hay, hidden, 4, 2000, Random(seed), start=[0])
        assert tokens[0] == 0
        assert 1900 < len(tokens) <= 2000
        text = TOKENIZER.decode(tokens[1:])
        lines = text.splitlines(keepends=True)[1:]  # the ring begins anywhere
        assert lines[-1].endswith(".\n")
        assert all(line.split()[0] in ("The", "Say", "Friends") for line in lines)
        assert sum(line.startswith(BEGINNING) for line in lines) == 12
        for number, fact in enumerate(hidden):
            assert abs(text.index(fact.line) / len(text) - (number // 3 + 0.5) / 4) < 0.125 + 0.05


WORDS = "".join(islice((line for line in stream(Random(4), 512) if not line.startswith(BEGINNING)), 500))
CODE = "".join(f"def f{n}():\n" + "".join(f"    x = {i * n};\n" for i in range(60)) for n in range(20))
LONG = {
    "no line ends": WORDS.replace("\n", " "),
    "no spaces": "".join(WORDS.split()),
    "characters of several bytes": "".join(chr(0x4E00 + n * n % 999) for n in range(3000)),
    "indented lines": CODE,
    "one long line among others": WORDS[:3000] + "x" * 9000 + "\n" + WORDS[:3000],
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_haystack_without_usual_lines_is_as_long_and_parts_no_character(text: str) -> None:
    hidden, hay = facts(Random(0), 8), TOKENIZER.encode(text)
    for seed in range(5):
        tokens = haystack(TOKENIZER, hay, hidden, 4, 1500, Random(seed))
        assert 1500 * 7 / 8 < len(tokens) <= 1500
        told = TOKENIZER.decode(tokens)
        assert "\ufffd" not in told[1:-1]  # the ring begins anywhere
        for number, fact in enumerate(hidden):
            place = told.index(fact.line)
            assert place == 0 or told[:place].rstrip(" ").endswith("\n")
            depth = len(TOKENIZER.encode(told[:place])) / len(tokens)
            assert abs(depth - (number // 2 + 0.5) / 4) < 0.125 + 0.1


def test_no_control_token_is_in_the_text() -> None:
    tokens = [TOKENIZER.bos_id, *TOKENIZER.encode("one"), TOKENIZER.eos_id, TOKENIZER.bos_id]
    assert plain_text(TOKENIZER, [*tokens, *TOKENIZER.encode("two\n"), TOKENIZER.eos_id]) == "one\ntwo\n"


def test_text_of_nothing_but_facts() -> None:
    with pytest.raises(UserError, match="no text to hide needles in"):
        find_needles(cast(Transformer, Reader(sight=100)), TOKENIZER, facts(Random(0), 1)[0].line, [1000])


def test_who_sees_everything_finds_every_needle() -> None:
    reader = cast(Transformer, Reader(sight=10_000))
    (short, long) = find_needles(reader, TOKENIZER, TEXT, [1000, 2000], depths=5, trials=7)
    assert short.found == short.asked == long.found == long.asked == (7,) * 5
    assert short.haystacks > long.haystacks


def test_who_sees_half_the_way_finds_half_the_needles() -> None:
    (found,) = find_needles(cast(Transformer, Reader(sight=1000)), TOKENIZER, TEXT, [2000], depths=4, trials=10)
    assert found.shares == (0, 0, 1, 1)


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_model_that_learnt_nothing_finds_nothing_and_its_cache_is_as_planned(
    tmp_path: Path, cache: CacheDtype
) -> None:
    model = random_model(config())
    results = find_needles(model, TOKENIZER, TEXT, [500, 1000], depths=2, trials=4, cache=cache)
    assert [sum(result.found) for result in results] == [0, 0]
    rows, picture = report_needles(results, model.config, tmp_path, "tiny", cache)
    assert [row["cache_bytes"] for row in rows] == [row["planned_cache_bytes"] for row in rows]
    written = json.loads((tmp_path / "needle.json").read_text(encoding="utf-8"))
    assert written["cache"] == cache and written["lengths"][1]["length"] == 1000
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_told() -> None:
    reader = cast(Transformer, Reader(sight=100, reach=1024))
    with pytest.raises(UserError, match="does not reach so far"):
        find_needles(reader, TOKENIZER, TEXT, [512, 2048])
    with pytest.raises(UserError, match="too short for its needles"):
        find_needles(reader, TOKENIZER, TEXT, [200], depths=10)


def test_a_passage_in_pieces_is_the_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(config())
    tokens = TOKENIZER.encode(TEXT)[:300]
    with torch.inference_mode():
        whole_TD, _ = model(torch.tensor(tokens), torch.arange(300), PackedAttend((300,)), GroupedDispatch())
    for at_once in (1 << 23, 37 * 32):
        monkeypatch.setattr(passage, "HIDDEN_AT_ONCE", at_once)
        pieces = list(hidden_of(model, LatentCache(model.config, 300, torch.float32), tokens))
        assert [first for first, _ in pieces] == list(range(0, 300, tokens_at_once(model.config, 300)))
        torch.testing.assert_close(torch.cat([hidden_TD for _, hidden_TD in pieces]), whole_TD, atol=2e-5, rtol=1e-4)


def test_lines_are_ordinary_words_of_the_tokenizer() -> None:
    per_line = [len(TOKENIZER.encode(filler(Random(seed)))) for seed in range(50)]
    assert sum(per_line) / len(per_line) < 2 * LINE_TOKENS
    assert len(NAMES) == len(set(NAMES)) == 256


def test_lengths_unless_told() -> None:
    assert steps_to(config(32_768)) == [512, 2048, 8192, 32_768]
    assert steps_to(config(256)) == [256]
