"""Token stores and batches: every label is the next token of its document, all are met, the cache is never stale."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cavelight.data import batches
from cavelight.data.batches import IGNORE, Batch, Batches, TokenStore, evaluation_windows, tokenize
from cavelight.data.corpus import Documents, HoldOut, read_corpus
from cavelight.data.tokenizer import Tokenizer, train_tokenizer
from cavelight.errors import UserError

CODE = "def f(x):\n    if x:\n        return (x,\n            1)\n\n\nclass É:\n    y = f(2)\n"
TOKENIZER = train_tokenizer([CODE] * 3, 290)

lengths_of_documents = st.lists(st.integers(2, 12), max_size=8).map(lambda lengths: [*lengths, 11])


def store_of(lengths: list[int]) -> TokenStore:
    """Documents of these lengths, in which every token is another one: its place in the store."""
    starts_M1 = np.cumsum([0, *lengths])
    return TokenStore(np.arange(starts_M1[-1], dtype=np.uint16), starts_M1, np.array(lengths) * 3)


def document_of(store: TokenStore, token: int) -> int:
    return int(np.searchsorted(store.starts_M1, token, side="right"))


def check(store: TokenStore, batch: Batch) -> None:
    """Each target is the token that truly follows, or IGNORE exactly where its document or its row has ended."""
    for tokens_L, targets_LJ in zip(
        batch.tokens_T.split(list(batch.rows)), batch.targets_TJ.split(list(batch.rows)), strict=True
    ):
        row = tokens_L.tolist()
        for i, targets in enumerate(targets_LJ.tolist()):
            for j, target in enumerate(targets):
                follows = row[i] + j + 1
                inside = follows < len(store) and document_of(store, follows) == document_of(store, row[i])
                assert target == (follows if inside and i + j < len(row) else IGNORE)
    assert batch.positions_T.tolist() == [i for length in batch.segments for i in range(length)]
    assert sum(batch.rows) == sum(batch.segments) == len(batch.tokens_T) == len(batch.targets_TJ)


@settings(deadline=None)
@given(lengths_of_documents, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(-5, 5), st.booleans())
def test_labels_follow_and_never_cross(
    lengths: list[int], row_length: int, rows: int, depths: int, seed: int, mask: bool
) -> None:
    store = store_of(lengths)
    loader = Batches(store, row_length, rows, depths, seed, mask)
    for step in range(3):
        batch = loader.batch(step)
        check(store, batch)
        assert batch.targets_TJ.shape == (rows * row_length, 1 + depths)
        assert batch.rows == (row_length,) * rows
        if not mask:
            assert batch.segments == batch.rows
            continue
        pieces = [[document_of(store, t) for t in piece.tolist()] for piece in batch.tokens_T.split(batch.segments)]
        assert all(len(set(piece)) == 1 for piece in pieces)


@settings(deadline=None)
@given(lengths_of_documents, st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_meets_every_token_once(lengths: list[int], row_length: int, epoch: int) -> None:
    store = store_of(lengths)
    loader = Batches(store, row_length, 1, 0, seed=1, mask_documents=False)
    first = epoch * loader.rows_per_epoch
    met = Counter[int]()
    inputs = Counter[int]()
    for step in range(first, first + loader.rows_per_epoch):
        batch = loader.batch(step)
        inputs.update(batch.tokens_T.tolist())
        met.update(batch.targets_TJ[:, 0].tolist())
    del met[IGNORE]
    assert set(met.values()) == set(inputs.values()) == {1}
    assert len(store) - len(inputs) < row_length
    possible = set(range(len(store))) - set(store.starts_M1.tolist())  # a beginning token is never a label
    assert met.keys() <= possible and len(possible) - len(met) < row_length


def test_batches_are_a_pure_function_of_seed_and_number() -> None:
    store = store_of([40, 30, 50])

    def tokens(seed: int, steps: range) -> list[list[int]]:
        loader = Batches(store, 5, 2, 0, seed, mask_documents=False)
        return [loader.batch(step).tokens_T.tolist() for step in steps]

    assert tokens(0, range(30))[::-1] == tokens(0, range(29, -1, -1))
    assert tokens(0, range(12)) != tokens(1, range(12))
    assert sorted(tokens(0, range(12))) != sorted(tokens(0, range(12, 24)))  # other windows, not only another order
    # The same on every machine and with every version of numpy.
    assert tokens(0, range(2)) == [[1, 2, 3, 4, 5, 81, 82, 83, 84, 85], [46, 47, 48, 49, 50, 11, 12, 13, 14, 15]]


def test_too_little_for_one_row() -> None:
    with pytest.raises(UserError, match="12 tokens for rows of 12"):
        Batches(store_of([12]), 12, 1, 0, 0, mask_documents=False)
    Batches(store_of([12]), 11, 1, 0, 0, mask_documents=False)


@settings(deadline=None)
@given(lengths_of_documents, st.integers(1, 9), st.data())
def test_evaluation_labels_every_token_once_with_context(lengths: list[int], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    budget = data.draw(st.integers(1, 30))
    store = store_of(lengths)
    windows, text_bytes = evaluation_windows(store, length, stride, budget)
    met = Counter[int]()
    for batch in windows:
        assert len(batch.tokens_T) <= budget or len(batch.rows) == 1
        assert batch.rows == batch.segments
        for tokens_L, targets_LJ in zip(
            batch.tokens_T.split(list(batch.rows)), batch.targets_TJ.split(list(batch.rows)), strict=True
        ):
            row, targets = tokens_L.tolist(), targets_LJ[:, 0].tolist()
            assert len(row) <= length and row == list(range(row[0], row[0] + len(row)))
            for i, target in enumerate(targets):
                if target == IGNORE:
                    continue
                met[target] += 1
                assert target == row[i] + 1 and document_of(store, target) == document_of(store, row[0])
                begins_document = row[0] in store.starts_M1
                assert begins_document or i + 1 > length - stride
    assert met == Counter(set(range(len(store))) - set(store.starts_M1.tolist()))
    assert text_bytes == 3 * len(store)


def test_evaluation_of_a_part() -> None:
    store = store_of([10, 40, 20, 30])  # 30, 120, 60, 90 bytes
    for limit in (60, 100, 300):
        windows, text_bytes = evaluation_windows(store, 8, 4, limit_bytes=limit)
        met = torch.cat([batch.targets_TJ[:, 0] for batch in windows]).tolist()
        documents = {document_of(store, token) for token in met if token != IGNORE}
        assert text_bytes == sum(int(store.bytes_M[document - 1]) for document in documents)
        assert limit / 2 <= text_bytes <= limit
        assert evaluation_windows(store, 8, 4, limit_bytes=limit)[1] == text_bytes
    assert evaluation_windows(store, 8, 4, limit_bytes=1)[1] == 30  # at least one document
    with pytest.raises(ValueError, match="stride 9"):
        evaluation_windows(store, 8, 9)


def corpus_at(folder: Path, files: dict[str, str]) -> Documents:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return read_corpus(str(folder)).train


@pytest.fixture
def part(tmp_path: Path) -> Documents:
    (tmp_path / "text").mkdir()
    return corpus_at(tmp_path / "text", {"a.py": CODE, "b.py": CODE * 2, "c.py": "é€", "d.py": "x", "e.py": "y"})


def texts(store: TokenStore, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """The documents' texts, after checking how they begin and end."""
    result = []
    for start, stop, size in zip(store.starts_M1[:-1], store.starts_M1[1:], store.bytes_M, strict=True):
        first, *ids, last = store.tokens_N[start:stop].tolist()
        assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
        result.append(tokenizer.decode(ids))
        assert len(result[-1].encode()) == size
    return result


@pytest.mark.parametrize("group_bytes", [1, 2 << 20])
def test_a_store_holds_the_documents(part: Documents, tmp_path: Path, group_bytes: int) -> None:
    heard: list[tuple[int, int]] = []
    store = tokenize(
        part, TOKENIZER, tmp_path, lambda done, total: heard.append((done, total)), group_bytes=group_bytes
    )
    assert texts(store) == [document.text for document in part]
    assert store.tokens_N.dtype == np.uint16 and len(store) == store.starts_M1[-1]
    assert heard == sorted(heard) and heard[-1] == (part.size, part.size)


def test_large_vocabularies_need_wider_tokens(part: Documents, tmp_path: Path) -> None:
    parts = json.loads(TOKENIZER._definition)
    parts["added_tokens"].append(parts["added_tokens"][0] | {"id": 70_000, "content": "<big>"})
    parts["model"]["vocab"]["<big>"] = 70_000
    wide = Tokenizer(json.dumps(parts), {"eos_token": "<big>"})
    store = tokenize(part, wide, tmp_path)
    assert store.tokens_N.dtype == np.uint32 and store.tokens_N[-1] == 70_000
    assert texts(store, wide) == [document.text for document in part]


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    built: list[str] = []
    groups = batches._groups

    def counted(part: Documents, group_bytes: int) -> Iterator[list[tuple[str, str]]]:
        built.append(part.part)
        return groups(part, group_bytes)

    monkeypatch.setattr(batches, "_groups", counted)
    return built


def test_the_cache_is_used_and_never_stale(part: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = count_builds(monkeypatch)
    first = tokenize(part, TOKENIZER, tmp_path)
    assert texts(tokenize(part, TOKENIZER, tmp_path)) == texts(first) and len(built) == 1
    changed = corpus_at(tmp_path / "text", {"a.py": "new"})
    assert texts(tokenize(changed, TOKENIZER, tmp_path)) == [document.text for document in changed]
    assert len(built) == 2
    other = train_tokenizer([CODE], 280)
    assert texts(tokenize(changed, other, tmp_path), other) == [document.text for document in changed]
    assert len(built) == 3
    tokenize(changed, TOKENIZER, tmp_path, split_line_ends=0.5)
    assert len(built) == 4


@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "bytes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["shorter", "bit", "gone"])
def test_a_damaged_cache_is_made_again(
    part: Documents, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = texts(tokenize(part, TOKENIZER, tmp_path))
    (file,) = tmp_path.glob(f"tokens-train-*/{name}")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content[1:-2] if damage == "shorter" else content)
    if damage == "gone":
        file.unlink()
    assert texts(tokenize(part, TOKENIZER, tmp_path)) == expected
    assert "made again" in caplog.text
    caplog.clear()
    tokenize(part, TOKENIZER, tmp_path)
    assert not caplog.text


def test_an_interrupted_build_leaves_nothing(part: Documents, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(part, TOKENIZER, tmp_path / "cache", interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_empty_part(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held part of the corpus is empty"):
        tokenize(Documents("held", (), HoldOut(20), "print"), TOKENIZER, tmp_path)


def test_line_ends_are_split_in_some_places(part: Documents, tmp_path: Path) -> None:
    whole = tokenize(part, TOKENIZER, tmp_path)
    ends = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.decode([i]) == "):\n    "]
    assert ends, "the test needs a token of signs and a line's end"

    def lone(store: TokenStore) -> int:
        return int(np.isin(store.tokens_N, ends).sum())

    for share in (0.5, 1.0):
        split = tokenize(part, TOKENIZER, tmp_path, split_line_ends=share, group_bytes=1)
        assert texts(split) == texts(whole)
        assert lone(split) < lone(whole) and (share < 1 or lone(split) == 0)
        assert np.array_equal(split.tokens_N, tokenize(part, TOKENIZER, tmp_path, split_line_ends=share).tokens_N)
