"""The corpus: what is read, how it is divided, and which input is refused with which words."""

import json
import lzma
import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cavelight.data import corpus
from cavelight.data import read as reading
from cavelight.data.corpus import Corpus, read_corpus, stdlib_corpus, xz_bits_per_byte
from cavelight.data.read import Document, Place, Source, documents_of, read_blocks
from cavelight.errors import UserError


def names(corpus: Corpus) -> tuple[list[str], list[str]]:
    return [document.name for document in corpus.train], [document.name for document in corpus.held]


def texts(corpus: Corpus) -> list[str]:
    return [document.text for part in (corpus.train, corpus.held) for document in part]


def folder_of(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_the_standard_library_is_divided_by_module_name() -> None:
    library = stdlib_corpus()
    train, held = names(library)
    assert {"json.decoder", "json", "argparse"} <= {*train, *held}
    assert train == sorted(train) and held == sorted(held) and not set(train) & set(held)
    # sha256("ast") begins bdab28c8, a multiple of 20; sha256("json") begins 02bd175f, none.
    assert "ast" in held and "json" in train
    assert 0.02 < len(held) / len(train) < 0.1
    assert not [name for name in train + held if {"test", "encodings", "pydoc_data"} & set(name.split("."))]


def test_the_standard_library_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="standard library is not on this machine"):
        stdlib_corpus()


def test_a_module_in_another_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules: dict[str, str | bytes] = {
        "a.py": "x = 1\n",
        "declared.py": b"# coding: latin-1\n# \xe9\n",
        "broken.py": b"# \xe9\n",
    }
    folder_of(tmp_path, modules | {"site-packages/b.py": "x", "test/c.py": "x", "p/__init__.py": "", "p/d.py": "y"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    library = stdlib_corpus()
    for _ in range(2):
        assert sorted(texts(library)) == ["# coding: latin-1\n# é\n", "x = 1\n", "y"]
    assert caplog.text.count("broken.py is left out") == 1


def test_a_folder_is_divided_by_file_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, str | bytes] = {f"sub/{n}.txt": f"text {n}" for n in range(40)}
    folder_of(tmp_path, files | {".git/config": "hidden", ".hidden": "x", "picture.png": b"\x89PNG\0", "empty": ""})
    read = read_corpus(str(tmp_path), held_out_every=4)
    train, held = names(read)
    assert sorted(train + held) == sorted(files)
    assert sorted(texts(read)) == sorted(f"text {n}" for n in range(40))
    assert 4 <= len(held) <= 16
    assert "picture.png is left out: a zero byte at byte 4" in caplog.text
    elsewhere = folder_of(tmp_path / "sub" / ".moved", files)
    assert names(read_corpus(str(elsewhere), held_out_every=4)) == (train, held)


def test_a_glob(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a/1.md": "one", "a/2.txt": "no", "b/c/3.md": "three"})
    train, held = names(read_corpus(f"{tmp_path}/**/*.md"))
    assert sorted(train + held) == ["a/1.md", "b/c/3.md"] and len(held) == 1


def test_one_text_file_is_cut_between_lines(tmp_path: Path) -> None:
    lines = [f"línea {n}\r\n" for n in range(400)]
    read = read_corpus(str(folder_of(tmp_path, {"a.txt": "\ufeff" + "".join(lines)}) / "a.txt"))
    parts = texts(read)
    assert all(part.endswith("\r\n") for part in parts)
    assert sorted(line for part in parts for line in part.splitlines(keepends=True)) == sorted(lines)
    held = sum(len(document.text) for document in read.held)
    assert 0.01 < held / sum(map(len, parts)) < 0.12
    assert abs(read.train.size + read.held.size - (tmp_path / "a.txt").stat().st_size) <= 1


def test_a_long_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 10)
    content = "äöü" * 50 + "\nend\n"  # a line far longer than a piece, of characters of two bytes
    read = read_corpus(str(folder_of(tmp_path, {"a": content, "b": "other"})))
    documents = [*read.train, *read.held]
    assert "".join(document.text for document in documents if document.name.split("#")[0] == "a") == content
    assert max(len(document.text.encode()) for document in documents) <= 22
    assert len({document.name for document in documents}) == len(documents) > 10


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(4, 12))
def test_pieces_add_up(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a"
    path.write_bytes(text.encode())
    source = Source("a", path, "text", len(text.encode()), len(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_BYTES", size)
        blocks = list(read_blocks(source, Place(), "text"))
        for number, block in enumerate(blocks, 1):  # reading may begin after any of them
            assert list(read_blocks(source, block.after, "text")) == blocks[number:]
    documents = [document for block in blocks for document in documents_of(block, "text", lambda name: True)]
    assert "".join(document.text for document in documents) == text.removeprefix("\ufeff")


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"id": n, "body": f"é {n}"}, ensure_ascii=n % 2 == 0) for n in range(60)]
    path = folder_of(tmp_path, {"a.jsonl": "\ufeff" + "\n".join([*lines, "", '{"body": ""}'])}) / "a.jsonl"
    read = read_corpus(str(path), text_key="body")
    train, held = names(read)
    assert sorted(texts(read)) == sorted(f"é {n}" for n in range(60))
    assert held and not set(train) & set(held) and all(name.startswith("a.jsonl:") for name in train)


def test_one_of_two_is_held_out_whatever_their_hashes(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.jsonl": '{"text": "1"}\n{"text": "2"}\n'})
    assert names(read_corpus(str(tmp_path), held_out_every=10**9)) == (["a.jsonl:1"], ["a.jsonl:2"])


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": "1", "b": "2"})
    before = read_corpus(str(tmp_path))
    assert read_corpus(str(tmp_path)).fingerprint == before.fingerprint == before.train.fingerprint
    assert read_corpus(str(tmp_path), held_out_every=3).fingerprint != before.fingerprint
    assert read_corpus(str(tmp_path), text_key="body").fingerprint != before.fingerprint
    os.utime(tmp_path / "a", ns=(0, 0))
    later = read_corpus(str(tmp_path)).fingerprint
    assert later != before.fingerprint
    folder_of(tmp_path, {"b": "22"})
    assert read_corpus(str(tmp_path)).fingerprint not in (before.fingerprint, later)


def test_the_fingerprint_minds_what_a_file_begins_with(tmp_path: Path) -> None:
    found = []
    for text in ("one of the texts", "the other text.."):
        (tmp_path / "a.txt").write_text(text * 4, encoding="utf-8")
        (tmp_path / "b.txt").write_text("more", encoding="utf-8")
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        found.append(read_corpus(str(tmp_path)).fingerprint)
    assert found[0] != found[1]


def test_what_a_corpus_holds_is_the_same_of_a_copy(tmp_path: Path) -> None:
    one, other = (folder_of(tmp_path / name, {"a": "1", "b": "2"}) for name in ("one", "other"))
    os.utime(other / "a", ns=(0, 0))
    content = read_corpus(str(one)).content
    assert read_corpus(str(other)).content == content
    assert read_corpus(str(one), held_out_every=3).content != content
    folder_of(other, {"b": "3"})
    assert read_corpus(str(other)).content != content


@pytest.mark.parametrize(
    ("files", "spec", "message"),
    [
        ({}, "gone.txt", "no text at .*gone.txt"),
        ({}, "*.txt", "no text at"),
        ({}, "", "no text at"),
        ({"a.png": b"\0", "b.png": b"\0"}, "", "no text at"),
        ({"a.bin": b"abc\0"}, "a.bin", "a.bin is not text.*zero byte at byte 3: a binary"),
        ({"a.txt": b"abc\xff"}, "a.txt", "a.txt is not text.*byte 3 is not UTF-8"),
        ({"a.txt": ""}, "a.txt", "empty"),
        ({"a.jsonl": "\n \n"}, "a.jsonl", "empty"),
        ({"a": "", "b": ""}, "", "empty"),
        ({"a.txt": "one line"}, "a.txt", "too small"),
        ({"a.txt": "a", "b.txt": ""}, "", "too small"),
    ],
)
def test_refused_at_once(tmp_path: Path, files: dict[str, str | bytes], spec: str, message: str) -> None:
    folder_of(tmp_path, files)
    with pytest.raises(UserError, match=message):
        read_corpus(str(tmp_path / spec))


def test_links_are_no_second_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same text under another name could be held out and learnt from."""
    folder_of(tmp_path, {"a.txt": "1", "b.txt": "2", "more/c.txt": "3"})
    for link, target in (("again.txt", "b.txt"), ("more/back", ".."), ("self", "self")):
        (tmp_path / link).symlink_to(target)
    for spec in (tmp_path, tmp_path / "**" / "*.txt"):
        assert sorted(texts(read_corpus(str(spec)))) == ["1", "2", "3"]
    assert "more/back is left out: a link to a folder" in caplog.text


def test_large_files_are_not_read_through_for_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 10)
    read: list[str] = []
    decided = corpus.record_names
    monkeypatch.setattr(corpus, "record_names", lambda block: read.append(block.source.name) or decided(block))
    folder_of(tmp_path, dict.fromkeys("abcdefgh", "line\n" * 100))
    read_corpus(str(tmp_path), held_out_every=10**9)
    assert read == list("abcdefgh")


def test_no_name_is_not_this_folder() -> None:
    with pytest.raises(UserError, match="No corpus is named"):
        read_corpus("")


def test_held_out_every_one() -> None:
    with pytest.raises(UserError, match="held_out_every 1"):
        read_corpus("anything", held_out_every=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"line\n" * 9000 + b"\xff\n", "a.txt is not UTF-8.*byte 45000"),
        ("a.txt", "ä\n".encode() * 9000 + b"\xc3", "a.txt is not UTF-8.*byte 27000"),
        ("a.jsonl", b'{"text": "a"}\n' * 700 + b'{"text": "\xff"}', "a.jsonl is not UTF-8.*byte 9810"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "a.jsonl:2 has no text under 'text'.*'body'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', "a.jsonl:2 has no text under 'text'"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl:2 has no text.*list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "n": 1' + b"0" * 5000 + b"}\n", "a.jsonl:2 is not JSON.*limit"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "a.jsonl:2 is not JSON.*recursion"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "a.jsonl:2 is not Unicode"),
    ],
)
def test_refused_when_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    read = read_corpus(str(tmp_path / name))
    with pytest.raises(UserError, match=message):
        texts(read)


def test_xz_counts_what_is_new() -> None:
    text = "".join(f"{n * n}," for n in range(500))
    alone = xz_bits_per_byte([Document("a", text)])
    assert alone == 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert xz_bits_per_byte([Document("a", text[:900]), Document("b", text[900:])]) == alone
    assert xz_bits_per_byte([Document("a", text)], seen=[Document("b", text)]) < alone / 10
    with pytest.raises(UserError, match="nothing to compress"):
        xz_bits_per_byte([])


def test_xz_remembers_only_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "XZ_WINDOW_BYTES", 10)
    near, far = Document("near", "b" * 10), Document("far", "".join(f"{n * n}," for n in range(500)))
    assert xz_bits_per_byte([far], seen=[far, near]) == xz_bits_per_byte([far], seen=[near])
