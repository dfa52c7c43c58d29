"""Files as blocks of raw records, and blocks as documents: text, JSON lines and Parquet, plain or compressed.

A block is what is read at once: a few megabytes, whatever the file's size. Where it begins (`Place`) is all that is
needed to read on from there, so that work on a corpus can be handed out in blocks and taken up after any of them.
"""

import codecs
import io
import json
import tokenize
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from cavelight.data.unpack import COMPRESSED, open_stored, optional
from cavelight.errors import UserError

BLOCK_BYTES = 1 << 20  # of JSON lines, or of a Parquet column
ROWS_AT_ONCE = 1 << 12  # of Parquet at most: where texts repeat, their size on the disk says little
PIECE_BYTES = 4 << 20  # a longer text becomes several documents, so that memory stays bounded
LONGEST_LINE = 128 << 20  # of JSON, which must be held whole to be understood
HEAD_BYTES = 1 << 20  # how much of a compressed file tells how far it was compressed

JSON_LINES = (".jsonl", ".ndjson")

Kind = Literal["python", "text", "lines", "jsonl", "parquet"]


@dataclass(frozen=True)
class Document:
    """`text` in Unicode; `name` is unique in its corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """One file of a corpus, its size in bytes, an estimate of its text's, and how it becomes documents.

    "python" and "text" are one document; "lines" is a lone text file, cut into pieces of `cut` bytes between lines so
    that each part of the corpus gets some of it; "jsonl" is one document a line, "parquet" one a row.
    """

    name: str
    path: Path
    kind: Kind
    size: int
    text_bytes: int
    cut: int = 0


class Place(NamedTuple):
    """Where a block begins: the number of its source, and of its first record in it; the byte that this begins at.

    Records are pieces of a text, lines (from 1), rows. A byte of a compressed file is one of what it holds.
    """

    source: int = 0
    number: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Block:
    """Consecutive records of a source as they are stored, texts of a Parquet column excepted. `after` is what follows.

    `first` is the number of its first record.
    """

    source: Source
    first: int
    offset: int
    data: bytes | list[str | None]
    after: Place

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else sum(len(text or "") for text in self.data)


def read_blocks(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    """The blocks of `source` from `place` on. Raises UserError where the file is broken."""
    match source.kind:
        case "parquet":
            yield from _parquet_blocks(source, place, text_key)
        case "jsonl":
            yield from _json_blocks(source, place)
        case _:
            yield from _text_blocks(source, place)


def documents_of(block: Block, text_key: str, wanted: Callable[[str], bool]) -> Iterator[Document]:
    """The documents of `block` whose side is `wanted`; a document longer than PIECE_BYTES is several.

    Raises UserError where it is not UTF-8 or not valid JSON, SyntaxError where Python cannot tell a file's encoding.
    """
    source, data = block.source, block.data
    if isinstance(data, list):
        rows = ((f"{source.name}:{number}", text) for number, text in enumerate(data, block.first))
        return (piece for name, text in rows if text and wanted(name) for piece in _pieces(name, text))
    if source.kind == "jsonl":
        return _json_documents(block, data, text_key, wanted)
    if source.kind == "lines":
        return _line_documents(block, data, wanted)
    if not wanted(source.name):
        return iter(())
    if source.kind == "python":
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)  # minds what the file declares (PEP 263)
        text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
        return iter([Document(source.name, text)])
    text = _decoded(data, source.path, block.offset)
    return iter([Document(f"{source.name}#{block.first}" if block.first else source.name, text)])


def record_names(block: Block) -> Iterator[str]:
    """What decides the side of each record of a block."""
    match block.data:
        case list() as texts:
            yield from (f"{block.source.name}:{number}" for number, text in enumerate(texts, block.first) if text)
        case bytes() as data if block.source.kind == "jsonl":
            yield from (f"{block.source.name}:{number}" for number, _ in _lines(data, block.first))
        case bytes() as data if block.source.kind == "lines":
            yield from (f"{block.source.name}#{number}" for number, _ in _cuts(data, block.first, block.source.cut))
        case _ if block.data:
            yield block.source.name


def kind_of(path: Path) -> Kind:
    inner = path.with_suffix("") if path.suffix in COMPRESSED else path
    if inner.suffix in JSON_LINES:
        return "jsonl"
    return "parquet" if path.suffix == ".parquet" else "text"


def examine(path: Path, kind: Kind, text_key: str) -> tuple[str, int]:
    """Why `path` is not text, or nothing; and about how many bytes of text it holds."""
    size = path.stat().st_size
    if kind == "parquet":
        return "", _Parquet(path, text_key).text_bytes
    compressed = path.suffix in COMPRESSED
    with open_stored(path) as (handle, stored):
        head = handle.read(HEAD_BYTES if compressed else 1 << 13)
        text_bytes = len(head) * size // max(stored.tell(), 1) if compressed and handle.read(1) else len(head)
    start = head[: 1 << 13]
    if b"\0" in start:
        return f"a zero byte at byte {start.index(0)}: a binary file", 0
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8", 0
    return "", text_bytes if compressed else size


@contextmanager
def _from(source: Source, offset: int) -> Iterator[BinaryIO]:
    with open_stored(source.path) as (handle, stored):
        if handle is stored:
            handle.seek(offset)
        while handle is not stored and offset and (passed := handle.read(min(offset, BLOCK_BYTES))):
            offset -= len(passed)
        yield handle


def _text_blocks(source: Source, place: Place) -> Iterator[Block]:
    """About PIECE_BYTES each, up to a line's end unless the line is endless; a Python file is never divided."""
    number, offset, torn = place.number, place.offset, b""
    with _from(source, offset) as handle:
        while True:
            undivided = source.kind == "python"
            # Where this ends depends only on where it began: a torn character counts to the block that it begins.
            read = handle.read(-1 if undivided else PIECE_BYTES - len(torn))
            data = torn + read + (b"" if undivided else handle.readline(PIECE_BYTES))
            if not data:
                return
            whole = len(data) - (_torn(data) if read else 0)
            data, torn = data[:whole], data[whole:]
            records = sum(1 for _ in _cuts(data, 0, source.cut)) if source.kind == "lines" else 1
            after = Place(place.source, number + records, offset + len(data))
            yield Block(source, number, offset, data, after)
            number, offset = after.number, after.offset


def _json_blocks(source: Source, place: Place) -> Iterator[Block]:
    number, offset = max(place.number, 1), place.offset
    with _from(source, offset) as handle:
        while data := handle.read(BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += handle.readline(LONGEST_LINE)
                if len(data) > LONGEST_LINE and not data.endswith(b"\n"):
                    raise UserError(
                        f"A line of {source.path} is too long",
                        got=f"more than {LONGEST_LINE >> 20} MiB after byte {offset}",
                        why="a JSON object is read whole",
                        do="divide it among several lines",
                    )
            after = Place(place.source, number + data.count(b"\n"), offset + len(data))
            yield Block(source, number, offset, data, after)
            number, offset = after.number, after.offset


def _parquet_blocks(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    number = place.number
    for rows in _Parquet(source.path, text_key).texts(number):
        after = Place(place.source, number + len(rows), 0)
        yield Block(source, number, 0, rows, after)
        number = after.number


class _Parquet:
    """One column of texts, read a few rows at a time. Raises UserError if the file is broken or has no such column."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._arrow = optional("pyarrow", "parquet", path)
        parquet = optional("pyarrow.parquet", "parquet", path)
        with self._clear_errors():
            self._file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
        names = self._file.schema_arrow.names
        kind = self._file.schema_arrow.field(column).type if names.count(column) == 1 else None
        if str(kind).removeprefix("dictionary<values=").split(",")[0] not in ("string", "large_string", "string_view"):
            got = f"the columns {', '.join(names)}" if kind is None else f"a column of {kind}"
            raise UserError(f"{path} has no text under {column!r}", got=got, do="name the column that holds the text")
        described = self._file.metadata
        groups = [described.row_group(number) for number in range(described.num_row_groups)]
        place = next(i for i in range(described.num_columns) if described.schema.column(i).path == column)
        self.text_bytes = sum(group.column(place).total_uncompressed_size for group in groups)
        self._ends = list(accumulate(group.num_rows for group in groups))

    def texts(self, first: int) -> Iterator[list[str | None]]:
        """Rows from number `first` on. A row group is gone through in the same steps wherever it is entered."""
        rows = self._ends[-1] if self._ends else 0
        at_once = min(max(1, rows * BLOCK_BYTES // max(self.text_bytes, 1)), ROWS_AT_ONCE)
        for group in range(bisect_right(self._ends, first), len(self._ends)):
            number = self._ends[group - 1] if group else 0
            with self._clear_errors():
                for batch in self._file.iter_batches(at_once, row_groups=[group], columns=[self.column]):
                    texts: list[str | None] = batch.column(0).to_pylist()[max(first - number, 0) :]
                    number += batch.num_rows
                    if texts:
                        yield texts

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text", got=str(error), do="write it again as UTF-8") from error
        except PermissionError as error:
            raise UserError(f"{self.path} may not be read", do="change its permissions or leave it out") from error
        except (self._arrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path} is a broken Parquet file",
                got=" ".join(str(error).split()),  # in one line
                do="fetch it again, or leave it out",
            ) from error


def _json_documents(block: Block, data: bytes, text_key: str, wanted: Callable[[str], bool]) -> Iterator[Document]:
    for number, (start, line) in _lines(data, block.first):
        name = f"{block.source.name}:{number}"
        if wanted(name):
            text = _decoded(line, block.source.path, block.offset + start)
            yield from _pieces(name, _text_field(text, f"{block.source.path}:{number}", text_key))


def _line_documents(block: Block, data: bytes, wanted: Callable[[str], bool]) -> Iterator[Document]:
    named = ((f"{block.source.name}#{number}", cut) for number, cut in _cuts(data, block.first, block.source.cut))
    start = block.offset
    # Neighbours on the same side stay together, so that the text is torn no more than needed.
    for is_wanted, run in groupby(named, key=lambda cut: wanted(cut[0])):
        (name, first), *others = run
        joined = b"".join([first, *(cut for _, cut in others)])
        if is_wanted:
            yield Document(name, _decoded(joined, block.source.path, start))
        start += len(joined)


def _lines(data: bytes, first: int) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """The lines that are not blank: their numbers, where they start, and what they hold."""
    start = 0
    for number, line in enumerate(data.split(b"\n"), first):
        if line.strip() not in (b"", codecs.BOM_UTF8):
            yield number, (start, line)
        start += len(line) + 1


def _cuts(data: bytes, first: int, size: int) -> Iterator[tuple[int, bytes]]:
    """`data` in cuts of about `size` bytes that end with a line, numbered."""
    handle = io.BytesIO(data)
    while cut := handle.read(size) + handle.readline():
        yield first, cut
        first += 1


def _pieces(name: str, text: str) -> Iterator[Document]:
    """`text` as one document, or as several of at most PIECE_BYTES characters that end with a line if they can."""
    start = number = 0
    while start < len(text):
        end = start + PIECE_BYTES
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield Document(f"{name}#{number}" if number else name, text[start:end])
        start, number = end, number + 1


def _torn(data: bytes) -> int:
    """How many bytes at the end begin a character in UTF-8 that ends beyond them."""
    for back, byte in enumerate(data[:-4:-1], 1):
        if byte & 0xC0 != 0x80:
            return back if byte >= 0xC0 and back < (2 + (byte >= 0xE0) + (byte >= 0xF0)) else 0
    return 0


def _decoded(data: bytes, path: Path, offset: int) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start} is not UTF-8"
        raise UserError(f"{path} is not UTF-8 text", got=place, do="convert the file to UTF-8") from error
    return text.removeprefix("\ufeff") if offset == 0 else text  # the byte order mark is no text


def _text_field(line: str, place: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the reader's limits on digits and on depth among them
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
