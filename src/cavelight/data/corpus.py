"""Text to learn from: the standard library's source by default, or any file, folder or glob of text, JSONL or Parquet.

Documents are read from disk each time they are iterated, so a corpus may be larger than memory. Which of them are held
out is decided by a hash of their name alone, so that it is the same on every machine and in every run.
"""

import functools
import glob
import hashlib
import itertools
import logging
import lzma
import os
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cavelight.data.read import (
    Block,
    Document,
    Place,
    Source,
    documents_of,
    examine,
    kind_of,
    read_blocks,
    record_names,
)
from cavelight.errors import UserError

WHOLE = ("python", "text")  # kinds of files that lie on one side
XZ_WINDOW_BYTES = 64 << 20  # how far `xz -9` looks back
HEAD_BYTES = 8 << 10  # of a file that a corpus' fingerprint minds
START = Place()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HoldOut:
    """The rule of division: one name in `every` is held out, by its hash; `moved` is on the side its hash is not.

    Names are all it knows: a text that a corpus has under two names may be on both sides.
    """

    every: int
    moved: str | None = None

    def __call__(self, name: str) -> bool:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()  # file names may be any bytes
        return (int(digest[:8], 16) % self.every == 0) != (name == self.moved)


@dataclass(frozen=True)
class Documents:
    """One part of a corpus, "train" or "held". Each iteration reads it from disk; empty documents are left out.

    `size` estimates its UTF-8 bytes. Iteration raises UserError where a file turns out not to be UTF-8, not valid JSONL
    or broken.
    """

    part: Literal["train", "held"]
    sources: tuple[Source, ...]
    rule: HoldOut
    fingerprint: str
    text_key: str = "text"

    def __iter__(self) -> Iterator[Document]:
        for block in self.blocks():
            yield from self.documents(block)

    def blocks(self, place: Place = START) -> Iterator[Block]:
        """What is to be read for this part, from `place` on."""
        for number in range(place.source, len(self.sources)):
            source = self.sources[number]
            if source.kind not in WHOLE or self.wants(source.name):
                yield from read_blocks(source, place if number == place.source else Place(number), self.text_key)

    def documents(self, block: Block) -> Iterator[Document]:
        """This part's documents in `block`, which tells its source itself: a copy without `sources` answers as well."""
        try:
            yield from (document for document in documents_of(block, self.text_key, self.wants) if document.text)
        except (SyntaxError, UnicodeDecodeError) as error:  # of a Python file that declares its own encoding
            warn_once(f"{block.source.path} is left out: {error}")

    def wants(self, name: str) -> bool:
        return self.rule(name) == (self.part == "held")

    @property
    def size(self) -> int:
        held_share = 1 / self.rule.every
        share = held_share if self.part == "held" else 1 - held_share
        whole = (source for source in self.sources if source.kind in WHOLE and self.wants(source.name))
        parted = sum(source.text_bytes for source in self.sources if source.kind not in WHOLE)
        return sum(source.text_bytes for source in whole) + round(parted * share)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents.

    `fingerprint` changes when the name, size or time of any file does; `content` with names, sizes and what files begin
    with, so that a copy has the same.
    """

    name: str
    train: Documents
    held: Documents
    fingerprint: str
    content: str


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
            size = path.stat().st_size
            sources.append(Source(module, path, "python", size, size))
    if not sources:
        raise UserError(
            "The source of the standard library is not on this machine",
            got=f"no modules in {root}",
            do="give a corpus of your own: a file, a folder or a glob",
        )
    return _corpus("stdlib", sources, HoldOut(every=20))


def read_corpus(spec: str, held_out_every: int = 20, text_key: str = "text") -> Corpus:
    """The corpus that `spec` names: "stdlib", a file, a folder (all below it that is not hidden) or a glob.

    `*.jsonl` and `*.ndjson` hold a JSON object per line with the text under `text_key`, `*.parquet` a row each with the
    text in that column; any other file is a document, and a lone one is cut between lines. Text and JSON lines may be
    packed (.gz, .bz2, .xz, .zst). In a folder, binary files are left out aloud. One name in `held_out_every` is held
    out, and at least one. Raises UserError when nothing is found, a file is broken or not UTF-8, or there is too
    little.
    """
    if spec == "stdlib":
        return stdlib_corpus()
    if not spec:
        raise UserError("No corpus is named", got="an empty path", do="name a file, a folder, a glob, or stdlib")
    if held_out_every < 2:
        raise UserError(
            "Nothing would be left to train on", got=f"held_out_every {held_out_every}", do="give 2 or more"
        )
    sources = []
    for name, path in _find(spec):
        kind = kind_of(path)
        problem, text_bytes = examine(path, kind, text_key)
        if problem and Path(spec).expanduser().is_dir():
            log.warning("%s is left out: %s.", path, problem)
        elif problem:
            raise UserError(f"{path} is not text", got=problem, do="give UTF-8 text, JSONL or Parquet")
        else:
            sources.append(Source(name, path, kind, path.stat().st_size, text_bytes))
    if not sources:
        raise UserError(f"There is no text at {spec}", got="no file of text", do="check the path or the glob")
    if len(sources) == 1 and sources[0].kind == "text":
        cut = min(1 << 16, max(1, sources[0].text_bytes // (8 * held_out_every)))  # so many that some are held out
        sources = [replace(sources[0], kind="lines", cut=cut)]
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
    blocks = (
        block
        for source in sources  # the first block of a file names all that lies on one side
        for block in itertools.islice(read_blocks(source, START, text_key), 1 if source.kind in WHOLE else None)
    )
    for document in itertools.chain.from_iterable(map(record_names, blocks)):
        names.append(document)
        if rule(document) != rule(names[0]):  # both sides have one, mostly within a few dozen names
            break
    else:
        if len(set(names)) < 2:
            raise UserError(
                f"The corpus {name} is {'too small' if names else 'empty'}",
                got="a single line or document" if names else "no text",
                why="some is to be learnt from, and some held out",
                do="give more text",
            )
        rule = replace(rule, moved=names[-1])
    state = [(source.name, source.kind, *_state(source)) for source in sources]
    fingerprint = hashlib.sha256(repr((3, rule.every, text_key, state)).encode()).hexdigest()
    timeless = [(*names, size, checksum) for *names, size, _, checksum in state]
    content = hashlib.sha256(repr((1, rule.every, text_key, timeless)).encode()).hexdigest()
    train, held = (Documents(part, tuple(sources), rule, fingerprint, text_key) for part in ("train", "held"))
    return Corpus(name, train, held, fingerprint, content)


def _state(source: Source) -> tuple[int, int, int]:
    """Size, time, and a checksum of the beginning: files that a tool has dated to zero differ in nothing else."""
    with open(source.path, "rb") as handle:
        return source.size, source.path.stat().st_mtime_ns, zlib.crc32(handle.read(HEAD_BYTES))


def _find(spec: str) -> Iterator[tuple[str, Path]]:
    """Files at `spec` with the names that decide their side: relative to the folder, so that it may be moved.

    A file that is met again, by way of a link, is left out: it could be on both sides.
    """
    root = Path(spec).expanduser()
    if root.is_file():
        yield root.name, root
        return
    if root.is_dir():
        found = list(_walk(root, lambda folder: True))
    else:
        found = [path for match in sorted(glob.glob(str(root), recursive=True)) if (path := Path(match)).is_file()]
        root = Path(os.path.commonpath([path.parent for path in found])) if found else root
    met: set[tuple[int, int]] = set()
    for path in found:
        if (identity := file_identity(path)) not in met:
            met.add(identity)
            yield path.relative_to(root).as_posix(), path


def file_identity(path: Path) -> tuple[int, int]:
    """What tells a file from every other on this machine, by whatever name and link it is reached."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _walk(root: Path, enters: Callable[[str], bool]) -> Iterator[Path]:
    """All regular files below `root` that are not hidden, in folders that `enters` likes."""
    for folder, folders, files in os.walk(root, onerror=lambda error: log.warning("Left out: %s.", error)):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and enters(name))
        for name in folders:
            if Path(folder, name).is_symlink():
                log.warning("%s is left out: a link to a folder.", Path(folder, name))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


@functools.cache
def warn_once(message: str) -> None:
    log.warning(message)
