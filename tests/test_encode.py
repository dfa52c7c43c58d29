"""Documents to tokens: FIM keeps the text whole, drawn things follow names."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cavelight.data.encode import Encoder, Manner
from cavelight.data.fim import FimTokens, cut_for_fim
from cavelight.data.read import Document
from cavelight.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer, train_tokenizer
from cavelight.errors import UserError

CODE = "def f(x):\n    if x:\n        return (x,\n            1)\n\n\nclass É:\n    y = f(2)  # naïve 漢字 ½\n"
TOKENIZER = train_tokenizer([CODE] * 3, 320)


def named(count: int) -> list[Document]:
    return [Document(f"file{number}", f"{number}é{CODE[: number % 90]}") for number in range(count)]


def documents_of(encoder: Encoder, documents: list[Document]) -> list[list[int]]:
    encoded = encoder.encode(documents)
    assert encoded.bytes_M.tolist() == [len(document.text.encode()) for document in documents]
    ends = np.cumsum(encoded.lengths_M)
    assert ends[-1] == len(encoded.tokens_N)
    return [part.tolist() for part in np.split(encoded.tokens_N, ends[:-1])]


def test_fim_tells_the_middle_last_and_all_of_the_text() -> None:
    documents = named(600)
    begin, hole, end = (TOKENIZER.control[name] for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    found = documents_of(Encoder(TOKENIZER, Manner(0.0, 0.3)), documents)
    plain = documents_of(Encoder(TOKENIZER, Manner()), documents)
    cut = [(ids, document) for ids, document in zip(found, documents, strict=True) if begin in ids]
    assert abs(len(cut) / 600 - 0.3) < 0.08
    for ids, document in cut:
        assert (ids[0], ids[1], ids[-1]) == (TOKENIZER.bos_id, begin, TOKENIZER.eos_id)
        assert ids.count(begin) == ids.count(hole) == ids.count(end) == 1
        at, to = ids.index(hole), ids.index(end)
        beginning, ending, middle = (TOKENIZER.decode(part) for part in (ids[2:at], ids[at + 1 : to], ids[to + 1 : -1]))
        assert beginning + middle + ending == document.text
    middles = sum(ids.index(end) < len(ids) - 2 for ids, _ in cut)
    assert middles > 0.9 * len(cut)  # empty where both cuts fall on one place
    whole = [(ids, other) for ids, other in zip(found, plain, strict=True) if begin not in ids]
    assert all(ids == other for ids, other in whole) and len(whole) == 600 - len(cut)
    assert all(begin in ids for ids in documents_of(Encoder(TOKENIZER, Manner(0.0, 1.0)), documents))


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=20), st.tuples(*[st.integers(0, 2**64 - 1)] * 3), st.floats(0, 1))
def test_cuts_are_at_characters(text: str, draws: tuple[int, int, int], rate: float) -> None:
    parts = cut_for_fim(text, draws, rate)
    assert (parts is None) == (draws[0] / 2**64 >= rate)
    assert parts is None or "".join(parts) == text


def test_cuts_are_anywhere() -> None:
    draws = np.random.PCG64(0).random_raw(3 * 2000).reshape(-1, 3).tolist()
    cuts = [cut_for_fim("abc", (0, second, third), 1.0) for _, second, third in draws]
    lengths = {tuple(map(len, parts)) for parts in cuts if parts}
    assert len(lengths) == 10  # all ways to divide three characters among three parts


def test_what_is_drawn_follows_the_name_alone() -> None:
    documents = named(200)
    encoder = Encoder(TOKENIZER, Manner(0.5, 0.5))
    together = documents_of(encoder, documents)
    assert together == documents_of(encoder, documents[::-1])[::-1]
    assert together == [ids for document in documents for ids in documents_of(encoder, [document])]
    renamed = [Document(document.name + "x", document.text) for document in documents]
    assert together != documents_of(encoder, renamed)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_line_ends_are_split_in_some_places(share: float) -> None:
    ends = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.decode([i]) == "):\n    "]
    assert ends, "the test needs a token of signs and a line's end"
    documents = [Document(f"file{number}", CODE) for number in range(40)]
    whole, split = (documents_of(Encoder(TOKENIZER, Manner(rate)), documents) for rate in (0.0, share))
    assert [TOKENIZER.decode(ids) for ids in whole] == [TOKENIZER.decode(ids) for ids in split]
    left = sum(ids.count(ends[0]) for ids in split) / sum(ids.count(ends[0]) for ids in whole)
    assert abs(left - (1 - share)) < 0.3 and (share < 1 or left == 0)


def test_other_tokenizers_have_other_names_for_it() -> None:
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    ids = [TOKENIZER.control[name] for name in (FIM_HOLE, FIM_BEGIN, FIM_END)]
    definition = json.loads(TOKENIZER._definition)
    for token in definition["added_tokens"]:
        if token["id"] in ids:
            old, token["content"] = token["content"], names[ids.index(token["id"])]
            definition["model"]["vocab"][token["content"]] = definition["model"]["vocab"].pop(old)
    other = Tokenizer(json.dumps(definition), TOKENIZER._settings)
    assert FimTokens.of(other) == FimTokens(*ids)
    without = Tokenizer(json.dumps(definition).replace("fim_", "mif_"), TOKENIZER._settings)
    with pytest.raises(UserError, match=r"no tokens for fill-in-the-middle.*data.fim_rate=0"):
        Encoder(without, Manner(fim_rate=0.1))
    Encoder(without, Manner(split_line_ends=0.1))
