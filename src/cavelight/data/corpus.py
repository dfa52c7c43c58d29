"""Text to learn from: the standard library's source by default, or any file, folder or glob of text or JSONL.

Documents are read from disk each time they are iterated, so a corpus may be larger than memory. Which of them are held
out is decided by a hash of their name alone, so that it is the same on every machine and in every run.
"""

import codecs
import functools
import glob
import hashlib
import itertools
import json
import logging
import lzma
import os
import sysconfig
import tokenize
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from cavelight.errors import UserError

PIECE_BYTES = 4 << 20  # a longer text file becomes several documents, so that memory stays bounded
XZ_WINDOW_BYTES = 64 << 20  # how far `xz -9` looks back

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """`text` in Unicode; `name` is unique in its corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """One file of a corpus, its size in bytes, and how it becomes documents.

    "python" and "text" are one document; "lines" is a lone text file, cut between lines so that each part of the corpus
    gets some of it; "jsonl" is one document a line.
    """

    name: str
    path: Path
    kind: Literal["python", "text", "lines", "jsonl"]
    size: int


@dataclass(frozen=True)
class HoldOut:
    """The rule of division: one name in `every` is held out, by its hash; `moved` is on the side its hash is not."""

    every: int
    moved: str | None = None

    def __call__(self, name: str) -> bool:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()  # file names may be any bytes
        return (int(digest[:8], 16) % self.every == 0) != (name == self.moved)


@dataclass(frozen=True)
class Documents:
    """One part of a corpus, "train" or "held". Each iteration reads it from disk; empty documents are left out.

    `size` estimates its UTF-8 bytes. Iteration raises UserError where a file turns out not to be UTF-8 or valid JSONL.
    """

    part: Literal["train", "held"]
    sources: tuple[Source, ...]
    rule: HoldOut
    fingerprint: str
    text_key: str = "text"

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            yield from (document for document in self._documents(source) if document.text)

    @property
    def size(self) -> int:
        held_share = 1 / self.rule.every
        share = held_share if self.part == "held" else 1 - held_share
        whole = (source for source in self.sources if source.kind in ("python", "text") and self._wants(source.name))
        parted = sum(source.size for source in self.sources if source.kind in ("lines", "jsonl"))
        return sum(source.size for source in whole) + round(parted * share)

    def _wants(self, name: str) -> bool:
        return self.rule(name) == (self.part == "held")

    def _documents(self, source: Source) -> Iterator[Document]:
        match source.kind:
            case "lines":
                named = _named_cuts(source, self.rule.every)
                # Neighbours on the same side stay together, so that the text is torn no more than needed.
                for wanted, run in itertools.groupby(named, key=lambda cut: self._wants(cut.name)):
                    if wanted:
                        first, *others = run
                        yield replace(first, text="".join([first.text, *(cut.text for cut in others)]))
            case "jsonl":
                for number, line in _json_lines(source.path):
                    name = f"{source.name}:{number}"
                    if self._wants(name):
                        yield Document(name, _text_field(line, f"{source.path}:{number}", self.text_key))
            case "text" if self._wants(source.name):
                for number, text in enumerate(_pieces(source.path, PIECE_BYTES)):
                    yield Document(f"{source.name}#{number}" if number else source.name, text)
            case "python" if self._wants(source.name):
                try:
                    with tokenize.open(source.path) as handle:  # minds the encoding that the file declares (PEP 263)
                        yield Document(source.name, handle.read())
                except (SyntaxError, UnicodeDecodeError) as error:
                    _warn_once(f"{source.path} is left out: {error}")


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents. `fingerprint` changes when the name, size or time of any file does."""

    name: str
    train: Documents
    held: Documents
    fingerprint: str


def stdlib_corpus() -> Corpus:
    """The standard library of the running interpreter, one document a module; one module in twenty is held out.

    Left out are tests (repetitive, and not in every installation), and `encodings` and `pydoc_data`: generated tables,
    which do not show how people write Python. Folders that are no packages (`site-packages`) are no part of it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
    sources = []
    for path in _walk(root, lambda folder: folder.isidentifier() and folder not in left_out):
        *packages, stem = path.relative_to(root).with_suffix("").parts
        if path.suffix == ".py" and stem.isidentifier():
            module = ".".join(packages if packages and stem == "__init__" else (*packages, stem))
            sources.append(Source(module, path, "python", path.stat().st_size))
    if not sources:
        raise UserError(
            "The source of the standard library is not on this machine",
            got=f"no modules in {root}",
            do="give a corpus of your own: a file, a folder or a glob",
        )
    return _corpus("stdlib", sources, HoldOut(every=20))


def read_corpus(spec: str, held_out_every: int = 20, text_key: str = "text") -> Corpus:
    """The corpus that `spec` names: "stdlib", a file, a folder (all below it that is not hidden) or a glob.

    `*.jsonl` and `*.ndjson` hold a JSON object per line with the text under `text_key`; any other file is a document,
    and a lone one is cut between lines. In a folder, binary files are left out aloud. One name in `held_out_every` is
    held out, and at least one. Raises UserError when nothing is found, a file is not UTF-8, or there is too little.
    """
    if spec == "stdlib":
        return stdlib_corpus()
    if held_out_every < 2:
        raise UserError(
            "Nothing would be left to train on", got=f"held_out_every {held_out_every}", do="give 2 or more"
        )
    sources = []
    for name, path in _find(spec):
        problem = _not_text(path)
        if problem and Path(spec).expanduser().is_dir():
            log.warning("%s is left out: %s.", path, problem)
        elif problem:
            raise UserError(f"{path} is not text", got=problem, do="give UTF-8 text or JSONL")
        else:
            kind: Literal["text", "jsonl"] = "jsonl" if path.suffix in (".jsonl", ".ndjson") else "text"
            sources.append(Source(name, path, kind, path.stat().st_size))
    if not sources:
        raise UserError(f"There is no text at {spec}", got="no file of text", do="check the path or the glob")
    if len(sources) == 1 and sources[0].kind == "text":
        sources = [replace(sources[0], kind="lines")]
    return _corpus(spec, sources, HoldOut(held_out_every), text_key)


def xz_bits_per_byte(documents: Iterable[Document], seen: Iterable[Document] = ()) -> float:
    """Bits that `xz -9e` needs for each UTF-8 byte of `documents`, compressed as one text.

    With `seen`, only what `documents` add to these is counted: the figure for a compressor that has read the training
    text first, of which it remembers the last 64 MiB.
    """
    before: deque[bytes] = deque()
    remembered = 0
    for document in seen:
        before.append(document.text.encode())
        remembered += len(before[-1])
        while remembered - len(before[0]) >= XZ_WINDOW_BYTES:
            remembered -= len(before.popleft())
    text_bytes = 0

    def texts() -> Iterator[bytes]:
        nonlocal text_bytes
        yield from before
        for document in documents:
            yield (text := document.text.encode())
            text_bytes += len(text)

    size = _xz_bytes(texts()) - (_xz_bytes(before) if before else 0)
    if not text_bytes:
        raise UserError("There is nothing to compress", got="no held-out text", do="give a larger corpus")
    return 8 * size / text_bytes


def _xz_bytes(texts: Iterable[bytes]) -> int:
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    return sum(len(compressor.compress(text)) for text in texts) + len(compressor.flush())


def _corpus(name: str, sources: list[Source], rule: HoldOut, text_key: str = "text") -> Corpus:
    """Divide `sources`; where the hash puts every document on one side, the last one is moved to the other."""
    sources.sort(key=lambda source: source.name)
    names: list[str] = []
    for document in _names(sources, rule.every):
        names.append(document)
        if rule(document) != rule(names[0]):  # both sides have one, mostly within a few dozen names
            break
    else:
        if len(names) < 2:
            raise UserError(
                f"The corpus {name} is {'too small' if names else 'empty'}",
                got="a single line or document" if names else "no text",
                why="some is to be learnt from, and some held out",
                do="give more text",
            )
        rule = replace(rule, moved=names[-1])
    state = [(source.name, source.kind, source.size, source.path.stat().st_mtime_ns) for source in sources]
    fingerprint = hashlib.sha256(repr((1, rule.every, text_key, state)).encode()).hexdigest()
    train, held = (Documents(part, tuple(sources), rule, fingerprint, text_key) for part in ("train", "held"))
    return Corpus(name, train, held, fingerprint)


def _names(sources: list[Source], every: int) -> Iterator[str]:
    """The names of all documents, before "lines" are joined."""
    for source in sources:
        match source.kind:
            case "lines":
                yield from (cut.name for cut in _named_cuts(source, every))
            case "jsonl":
                yield from (f"{source.name}:{number}" for number, _ in _json_lines(source.path))
            case _ if source.size:
                yield source.name


def _named_cuts(source: Source, every: int) -> Iterator[Document]:
    size = min(1 << 16, max(1, source.size // (8 * every)))  # enough cuts that some are held out
    return (Document(f"{source.name}#{number}", text) for number, text in enumerate(_pieces(source.path, size)))


def _pieces(path: Path, size: int) -> Iterator[str]:
    """The text of `path` in pieces of about `size` bytes that end with a line, unless a line is endless."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as handle:
        while True:
            start = handle.tell() - len(decoder.getstate()[0])
            block = handle.read(size) + handle.readline(PIECE_BYTES)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, start + error.start) from error
            if text := text.removeprefix("\ufeff") if start == 0 else text:  # the byte order mark is no text
                yield text
            if not block:
                return


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of `path` that are not blank, with their numbers from 1."""
    offset = 0
    with _open(path) as handle:
        for number, line in enumerate(handle, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from error
            offset += len(line)
            if text.strip():
                yield number, text


def _text_field(line: str, place: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON", got=str(error), do="mend the line: one JSON object per line") from error
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        got = "the keys " + ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{place} has no text under {key!r}", got=got, do="name the key that holds the text")
    text: str = record[key]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} is not Unicode", got=f"half a character, {text[error.start]!r}") from error
    return text


def _find(spec: str) -> Iterator[tuple[str, Path]]:
    """Files at `spec` with the names that decide their side: relative to the folder, so that it may be moved."""
    root = Path(spec).expanduser()
    if root.is_file():
        yield root.name, root
        return
    if root.is_dir():
        found = list(_walk(root, lambda folder: True))
    else:
        found = [path for match in glob.glob(str(root), recursive=True) if (path := Path(match)).is_file()]
        root = Path(os.path.commonpath([path.parent for path in found])) if found else root
    for path in found:
        yield path.relative_to(root).as_posix(), path


def _walk(root: Path, enters: Callable[[str], bool]) -> Iterator[Path]:
    """All regular files below `root` that are not hidden, in folders that `enters` likes."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and enters(name))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _not_text(path: Path) -> str:
    """Why the beginning of `path` is not UTF-8 text, or nothing."""
    with _open(path) as handle:
        head = handle.read(1 << 13)
    if b"\0" in head:
        return f"a zero byte at byte {head.index(0)}: a binary file"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    return ""


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except PermissionError as error:
        raise UserError(f"{path} may not be read", do="change its permissions or leave it out") from error


def _not_utf8(path: Path, offset: int) -> UserError:
    return UserError(f"{path} is not UTF-8 text", got=f"byte {offset} is not UTF-8", do="convert the file to UTF-8")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
