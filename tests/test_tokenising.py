"""Token stores: what they hold, on however many processes, after whatever kills; and never a stale or damaged one."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cavelight.data import read as reading
from cavelight.data import store as storing
from cavelight.data import tokenising
from cavelight.data.corpus import Documents, HoldOut, read_corpus
from cavelight.data.encode import Manner
from cavelight.data.store import TokenStore
from cavelight.data.tokenising import joined, tokenize
from cavelight.data.tokenizer import Tokenizer, train_tokenizer
from cavelight.errors import UserError

CODE = "def f(x):\n    if x:\n        return (x,\n            1)\n\n\nclass É:\n    y = f(2)\n"
TOKENIZER = train_tokenizer([CODE] * 3, 290)
FILES = ("tokens.bin", "starts.bin", "bytes.bin", "meta.json")


def corpus_at(folder: Path, files: dict[str, str]) -> Documents:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return read_corpus(str(folder)).train


@pytest.fixture
def part(tmp_path: Path) -> Documents:
    (tmp_path / "text").mkdir()
    return corpus_at(tmp_path / "text", {"a.py": CODE, "b.py": CODE * 2, "c.py": "é€", "d.py": "x", "e.py": "y"})


@pytest.fixture
def lines(tmp_path: Path) -> Documents:
    """One file of many documents."""
    texts = (f"{CODE[: n % 70]} {n}" for n in range(300))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return read_corpus(str(tmp_path / "a.jsonl")).train


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, tasks and pieces of a small corpus."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 500)
    monkeypatch.setattr(tokenising, "BLOCK_BYTES", 900)
    monkeypatch.setattr(storing, "PIECE_BYTES", 2000)


def texts(store: TokenStore, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """The documents' texts, after checking how they begin and end."""
    result = []
    for start, stop, size in zip(store.starts_M1[:-1], store.starts_M1[1:], store.bytes_M, strict=True):
        first, *ids, last = store.tokens_N[start:stop].tolist()
        assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
        result.append(tokenizer.decode(ids))
        assert len(result[-1].encode()) == size
    return result


def files(cache: Path) -> dict[str, bytes]:
    """What the one store in a folder consists of."""
    (folder,) = cache.glob("tokens-*")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_store_holds_the_documents(part: Documents, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    store = tokenize(part, TOKENIZER, tmp_path, lambda done, total: heard.append((done, total)))
    assert texts(store) == [document.text for document in part]
    assert store.tokens_N.dtype == np.uint16 and len(store) == store.starts_M1[-1]
    assert heard == sorted(heard) and heard[0] == (0, part.size) and heard[-1] == (part.size, part.size)


@pytest.mark.usefixtures("small_steps")
def test_the_number_of_processes_does_not_matter(lines: Documents, tmp_path: Path) -> None:
    manner = Manner(split_line_ends=0.5, fim_rate=0.5)
    alone = tokenize(lines, TOKENIZER, tmp_path / "alone", manner=manner, workers=0)
    many = tokenize(lines, TOKENIZER, tmp_path / "many", manner=manner, workers=2)
    assert files(tmp_path / "alone") == files(tmp_path / "many")
    assert 3 < len(json.loads(files(tmp_path / "alone")["meta.json"])["pieces"]) <= 1 + alone.tokens_N.nbytes // 2000
    assert len(alone) == len(many)


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
    encoded = tokenising._encoded

    def counted(part: Documents, *others: object) -> object:
        built.append(part.part)
        return encoded(part, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenising, "_encoded", counted)
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
    tokenize(changed, TOKENIZER, tmp_path, manner=Manner(split_line_ends=0.5))
    tokenize(changed, TOKENIZER, tmp_path, manner=Manner(fim_rate=0.5))
    assert len(built) == 5


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["shorter", "longer", "bit", "gone"])
def test_a_damaged_cache_is_made_again(
    part: Documents, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = texts(tokenize(part, TOKENIZER, tmp_path))
    (file,) = tmp_path.glob(f"tokens-train-*/{name}")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes({"shorter": content[1:-2], "longer": content + b"1"}.get(damage, content))
    if damage == "gone":
        file.unlink()
    assert texts(tokenize(part, TOKENIZER, tmp_path)) == expected
    assert "made again" in caplog.text
    caplog.clear()
    tokenize(part, TOKENIZER, tmp_path)
    assert not caplog.text


@pytest.mark.usefixtures("small_steps")
def test_every_byte_is_checked_in_the_end(lines: Documents, tmp_path: Path) -> None:
    """Opening looks at pieces of a large store at random: any one may be told from damage, and a few suffice."""
    tokenize(lines, TOKENIZER, tmp_path)
    (folder,) = tmp_path.glob("tokens-*")
    key = json.loads((folder / "meta.json").read_text())["key"]
    for name in FILES[:3]:
        content = (folder / name).read_bytes()
        for place in range(0, len(content), len(content) // 7):
            damaged = bytearray(content)
            damaged[place] ^= 4
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name}|starts"):
                TokenStore.read(folder, key, checked_bytes=None)
        outcomes = {opens(folder, key, checked_bytes=4000) for _ in range(60)}
        assert outcomes == {True, False}
        (folder / name).write_bytes(content)
    assert TokenStore.read(folder, key, checked_bytes=None) is not None


def opens(folder: Path, key: str, checked_bytes: int) -> bool:
    try:
        return TokenStore.read(folder, key, checked_bytes) is not None
    except ValueError:
        return False


KILLED = """
import os, signal, sys
from pathlib import Path
from cavelight.data import read, store, tokenising
from cavelight.data.corpus import read_corpus
from cavelight.data.encode import Manner
from cavelight.data.tokenizer import Tokenizer

read.BLOCK_BYTES, tokenising.BLOCK_BYTES, store.PIECE_BYTES = 500, 900, 2000
corpus, tokenizer, cache, calls, workers = sys.argv[1:]
left = int(calls)

def progress(done, total):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

part = read_corpus(corpus).train
tokenising.tokenize(part, Tokenizer.load(tokenizer), cache, progress, manner=Manner(0.5, 0.5), workers=int(workers))
"""


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("workers", "kills"), [(0, (4, 2, 7)), (2, (5,))])
def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(
    lines: Documents, tmp_path: Path, workers: int, kills: tuple[int, ...]
) -> None:
    tokenize(lines, TOKENIZER, tmp_path / "whole", manner=Manner(0.5, 0.5), workers=0)
    TOKENIZER.save(tmp_path / "tokenizer")
    path = lines.sources[0].path
    told = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "tokenizer"), str(tmp_path / "cut")]
    reached = [0]
    for calls in kills:
        ended = subprocess.run([*told, str(calls), str(workers)], check=False)
        assert ended.returncode == -signal.SIGKILL
        (journal,) = (tmp_path / "cut").glob("tokens-*.unfinished/journal.jsonl")
        reached.append(journal.read_bytes().count(b"\n"))
    assert reached[1] > 0 and reached == sorted(reached)
    journal.write_bytes(journal.read_bytes() + b'{"tokens": 12')  # as a kill within a line would leave it
    heard: list[int] = []
    tokenize(lines, TOKENIZER, tmp_path / "cut", lambda done, _: heard.append(done), manner=Manner(0.5, 0.5))
    assert heard[0] > 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_steps")
def test_what_an_interrupted_call_left_is_not_trusted_blindly(lines: Documents, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(lines, TOKENIZER, tmp_path / "cut", interrupt)
    (tokens,) = (tmp_path / "cut").glob("tokens-*.unfinished/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:100])
    tokenize(lines, TOKENIZER, tmp_path / "cut")
    tokenize(lines, TOKENIZER, tmp_path / "whole")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_worker_that_is_killed_is_told(lines: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 500)
    monkeypatch.setattr(tokenising, "BLOCK_BYTES", 900)
    monkeypatch.setattr(storing, "PIECE_BYTES", 100)
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    def kill(done: int, total: int) -> None:
        if done and started[0].poll() is None:
            started[0].kill()

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(UserError, match=r"was killed. Got: signal 9.*goes on from there"):
        tokenize(lines, TOKENIZER, tmp_path, kill, workers=2)
    assert [process.poll() is not None for process in started] == [True, True]
    heard: list[int] = []
    tokenize(lines, TOKENIZER, tmp_path, lambda done, _: heard.append(done))
    assert heard[0] > 0  # it goes on indeed


@pytest.mark.usefixtures("small_steps")
def test_mistakes_come_through_from_a_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['{"text": "a line of text"}'] * 300
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", *lines]))
    part = read_corpus(str(tmp_path / "a.jsonl"), held_out_every=10**9).train
    with pytest.raises(UserError, match=r"a.jsonl:301 is not JSON") as found:
        tokenize(part, TOKENIZER, tmp_path / "cache", workers=2)
    assert found.value.do == "mend the line: one JSON object per line"


def test_warnings_come_through_from_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.py").write_bytes(b"# \xe9\n")
    (tmp_path / "good.py").write_text("x = 1\n")
    source = reading.Source("bad", tmp_path / "bad.py", "python", 4, 4)
    other = reading.Source("good", tmp_path / "good.py", "python", 6, 6)
    part = Documents("train", (source, other), HoldOut(10**9), "print")
    with caplog.at_level(logging.WARNING):
        store = tokenize(part, TOKENIZER, tmp_path / "cache", workers=1)
    assert texts(store) == ["x = 1\n"] and caplog.text.count("bad.py is left out") == 1


def test_an_empty_part(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held part of the corpus is empty"):
        tokenize(Documents("held", (), HoldOut(20), "print"), TOKENIZER, tmp_path)
    assert not list(tmp_path.glob("tokens-*"))


def test_joined_stores_hold_all_documents(part: Documents, lines: Documents, tmp_path: Path) -> None:
    stores = {"a": tokenize(part, TOKENIZER, tmp_path), "b": tokenize(lines, TOKENIZER, tmp_path)}
    whole = joined(stores, TOKENIZER, tmp_path, "a and b")
    assert texts(whole) == texts(stores["a"]) + texts(stores["b"])
    assert joined(stores, TOKENIZER, tmp_path, "a and b").bytes_M.sum() == whole.bytes_M.sum()
    assert joined({"a": stores["a"]}, TOKENIZER, tmp_path, "a") is stores["a"]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("commits", [1, 3])
def test_joining_goes_on_after_a_kill(
    part: Documents, lines: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    monkeypatch.setattr(storing, "DOCUMENTS_AT_ONCE", 7)
    stores = {"a": tokenize(part, TOKENIZER, tmp_path), "b": tokenize(lines, TOKENIZER, tmp_path)}
    joined(stores, TOKENIZER, tmp_path / "whole", "a and b")
    commit, left = storing.StoreWriter.commit, commits

    def interrupted(writer: storing.StoreWriter) -> None:
        nonlocal left
        commit(writer)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(storing.StoreWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        joined(stores, TOKENIZER, tmp_path / "cut", "a and b")
    joined(stores, TOKENIZER, tmp_path / "cut", "a and b")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("meta", ['{"key": "x", "pieces": [], "dtype": "<u2"}', "[]", "{", '{"key": "x"}'])
def test_a_meta_file_of_another_make(tmp_path: Path, meta: str) -> None:
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(ValueError):
        TokenStore.read(tmp_path, "x")


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("line", [b"\0\0\n", b"{}\n", b"3\n"])
def test_a_journal_that_cannot_be_read_counts_for_nothing(lines: Documents, tmp_path: Path, line: bytes) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(lines, TOKENIZER, tmp_path / "cut", interrupt)
    (journal,) = (tmp_path / "cut").glob("tokens-*.unfinished/journal.jsonl")
    journal.write_bytes(journal.read_bytes() + line)
    tokenize(lines, TOKENIZER, tmp_path / "cut")
    tokenize(lines, TOKENIZER, tmp_path / "whole")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_many_small_files_are_grouped_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    size = reading.Block.size.fget
    monkeypatch.setattr(reading.Block, "size", property(lambda block: asked.append(1) or size(block)))
    source = reading.Source("a", Path("a"), "text", 1, 1)
    blocks = [reading.Block(source, 0, 0, bytes(100), reading.Place()) for _ in range(1000)]
    monkeypatch.setattr(tokenising, "BLOCK_BYTES", 30_000)
    assert [len(task) for task in tokenising._tasks(blocks)] == [300, 300, 300, 100]
    assert len(asked) == len(blocks)


@pytest.mark.parametrize("sent", [b"", b"\x80\x05\x95\xff\x00\x00\x00\x00\x00\x00\x00]"])
def test_a_worker_whose_caller_was_killed_ends_without_a_word(sent: bytes) -> None:
    command = "from cavelight.data.worker import main; main()"
    ended = subprocess.run([sys.executable, "-c", command], input=sent, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def test_two_processes_do_not_make_one_store_at_once(tmp_path: Path) -> None:
    waiting = "import sys; from pathlib import Path; from cavelight.data.store import unfinished\n"
    waiting += "with unfinished(Path(sys.argv[1])): print('in', flush=True)"
    with storing.unfinished(tmp_path / "tokens"):
        child = subprocess.Popen([sys.executable, "-c", waiting, str(tmp_path / "tokens")], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=1)
    assert child.communicate(timeout=30)[0] == b"in\n" and child.returncode == 0
