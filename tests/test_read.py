"""Formats: what is read from packed files and from Parquet, in whatever blocks, and which words a broken one gets."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cavelight.data import read as reading
from cavelight.data.corpus import Corpus, Documents, read_corpus
from cavelight.data.read import Place
from cavelight.errors import UserError

TEXTS = [f"{n}: é " + "word " * (n % 7) for n in range(300)]
LINES = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def parquet_at(path: Path, texts: list[str | None], **options: int) -> Path:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, **options)
    return path


def texts(corpus: Corpus) -> list[str]:
    return [document.text for part in (corpus.train, corpus.held) for document in part]


@pytest.mark.parametrize("suffix", PACK)
def test_packed_lines_read_as_the_plain_ones(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](LINES))
    packed = read_corpus(str(tmp_path / f"a.jsonl{suffix}"))
    assert sorted(texts(packed)) == sorted(texts(read_corpus(str(tmp_path / "a.jsonl")))) == sorted(TEXTS)
    assert abs(packed.train.size + packed.held.size - len(LINES)) < len(LINES) / 10


@pytest.mark.parametrize("suffix", PACK)
def test_packed_text_is_cut_between_lines(tmp_path: Path, suffix: str) -> None:
    text = "".join(text + "\n" for text in TEXTS)
    (tmp_path / f"a.txt{suffix}").write_bytes(PACK[suffix](text[:999].encode()) + PACK[suffix](text[999:].encode()))
    found = texts(read_corpus(str(tmp_path / f"a.txt{suffix}")))
    assert sorted("".join(found).splitlines()) == sorted(text.splitlines()) and len(found) > 2


def test_parquet_is_read_by_rows(tmp_path: Path) -> None:
    rows: list[str | None] = [*TEXTS, None, ""]
    corpus = read_corpus(str(parquet_at(tmp_path / "a.parquet", rows, row_group_size=70)))
    assert sorted(texts(corpus)) == sorted(TEXTS)
    assert all(document.name.startswith("a.parquet:") for document in corpus.held)


def test_a_folder_may_mix_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "b.txt").write_text("plain text")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"name\0\0\0"))
    parquet_at(tmp_path / "d.parquet", ["from parquet"])
    assert sorted(texts(read_corpus(str(tmp_path)))) == sorted([*TEXTS, "plain text", "from parquet"])


def every_kind(folder: Path) -> Documents:
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(LINES))
    (folder / "b.jsonl").write_bytes(LINES)
    (folder / "c.txt").write_text("ä\n" * 500, encoding="utf-8")
    parquet_at(folder / "d.parquet", list(TEXTS), row_group_size=70)
    (folder / "e.md.zst").write_bytes(zstandard.compress(b"line\n" * 400))
    return read_corpus(str(folder)).train


def test_reading_may_go_on_after_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    part = every_kind(tmp_path)
    blocks = list(part.blocks())
    assert {block.source.name[0] for block in blocks} == set("abcde")
    assert min(sum(block.source.name[0] == name for block in blocks) for name in "abcde") > 2
    for number, block in enumerate(blocks, 1):
        rest = part.blocks(block.after)
        assert next(rest, None) == (blocks[number] if number < len(blocks) else None)
    names = [document.name for document in part]
    assert len(names) == len(set(names))
    assert list(part.blocks(Place(len(part.sources)))) == []


def test_blocks_do_not_decide_what_documents_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = every_kind(tmp_path)
    whole = list(part)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    assert list(part) == whole


def test_a_long_record_becomes_several_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 40)
    book = "".join(f"line {n}\n" for n in range(50)) + "x" * 100
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": book}) + '\n{"text": "short"}\n')
    corpus = read_corpus(str(tmp_path / "a.jsonl"), held_out_every=10**9)
    pieces = [document for document in corpus.train if document.name.startswith("a.jsonl:1")]
    assert "".join(piece.text for piece in pieces) == book and max(len(piece.text) for piece in pieces) <= 40
    assert [piece.name for piece in pieces[:3]] == ["a.jsonl:1", "a.jsonl:1#1", "a.jsonl:1#2"]
    assert all(piece.text.endswith("\n") for piece in pieces[:9])


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["cut off", "bytes changed", "no archive"])
def test_broken_archives(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = bytearray(PACK[suffix](bytes(LINES) * 50))
    if damage == "cut off":
        del packed[len(packed) * 3 // 4 :]
    elif damage == "bytes changed":
        packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(LINES if damage == "no archive" else packed)
    with pytest.raises(UserError, match=f"a.jsonl{suffix} is (a broken archive|not UTF-8)|a.jsonl{suffix}:.* not JSON"):
        texts(read_corpus(str(tmp_path / f"a.jsonl{suffix}")))


@pytest.mark.parametrize("damage", ["cut off", "no parquet"])
def test_broken_parquet(tmp_path: Path, damage: str) -> None:
    path = parquet_at(tmp_path / "a.parquet", list(TEXTS))
    path.write_bytes(path.read_bytes()[:-50] if damage == "cut off" else b"text")
    with pytest.raises(UserError, match=r"a.parquet is a broken Parquet file"):
        read_corpus(str(path))


def test_broken_pages_of_parquet(tmp_path: Path) -> None:
    path = parquet_at(tmp_path / "a.parquet", list(TEXTS), compression="zstd")
    content = bytearray(path.read_bytes())
    content[2000:2400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet is a broken Parquet file"):
        texts(read_corpus(str(path)))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = parquet_at(tmp_path / "a.parquet", list(TEXTS))
    with pytest.raises(UserError, match=r"no text under 'body'.*the columns id, text"):
        read_corpus(str(path), text_key="body")
    with pytest.raises(UserError, match=r"no text under 'id'.*a column of int64"):
        read_corpus(str(path), text_key="id")


@pytest.mark.parametrize("values", [[["a", "b"]], [{"a": "x"}], [b"x"]], ids=["list", "struct", "binary"])
def test_a_column_that_holds_no_texts(tmp_path: Path, values: list[object]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": values * 50}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no text under 'text'. Got: a column of (list|struct|binary)"):
        read_corpus(str(tmp_path / "a.parquet"))


def test_columns_with_names_that_mislead(tmp_path: Path) -> None:
    path, column = tmp_path / "a.parquet", pyarrow.array(TEXTS)
    pyarrow.parquet.write_table(pyarrow.table({"a.text": column, "a": range(len(TEXTS))}), path)
    assert sorted(texts(read_corpus(str(path), text_key="a.text"))) == sorted(TEXTS)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"Got: the columns text, text"):
        read_corpus(str(path))


def test_texts_that_repeat_are_read_in_small_blocks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary makes a column small on the disk, which must not make its rows look small."""
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", 100)
    corpus = read_corpus(str(parquet_at(tmp_path / "a.parquet", ["the same " * 1000, "and another"] * 500)))
    assert max(len(block.data) for block in corpus.train.blocks()) == 100


def test_a_file_that_has_gone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    corpus = read_corpus(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a.jsonl cannot be read. Got: No such file"):
        texts(corpus)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_package_that_is_not_there(tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_at(tmp_path / "a.parquet", list(TEXTS))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(LINES))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{name} needs the package {package}, which is not installed.*pip install"):
        read_corpus(str(tmp_path / name))


def test_an_endless_line_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 10 + '{"text": "' + "a" * 2000 + '"}\n')
    with pytest.raises(UserError, match=r"A line of .*a.jsonl is too long"):
        texts(read_corpus(str(tmp_path / "a.jsonl")))
