"""A corpus as token ids on disk, and the batches that training and evaluation read from it.

Letters: N tokens of the store, M documents, T tokens of one batch (all rows laid end to end), L tokens of one row,
J prediction depths (1 + MTP modules).
"""

import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cavelight.data.corpus import Documents
from cavelight.data.tokenizer import Tokenizer
from cavelight.disk import folder_beside
from cavelight.errors import UserError

IGNORE = -100  # a target that is no label: beyond its document or its row

Int64 = NDArray[np.int64]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end, without padding.

    `targets_TJ[i, j]` is the token j + 1 places after token i if it lies in the same document and row, else IGNORE.
    `rows` are the rows' lengths, `segments` the lengths within which tokens see one another, `positions_T` counts from
    0 in each segment. All int64.
    """

    tokens_T: Tensor
    targets_TJ: Tensor
    positions_T: Tensor
    rows: tuple[int, ...]
    segments: tuple[int, ...]


@dataclass(frozen=True)
class TokenStore:
    """The tokens of one part of a corpus: each document is the beginning token, its text, the end token.

    `tokens_N` stays on disk (uint16 or uint32); document m is tokens_N[starts_M1[m] : starts_M1[m + 1]], and its text
    has bytes_M[m] bytes in UTF-8.
    """

    tokens_N: NDArray[Any]
    starts_M1: Int64
    bytes_M: Int64

    def __len__(self) -> int:
        return len(self.tokens_N)

    @classmethod
    def read(cls, folder: Path, key: str) -> "TokenStore | None":
        """The store in `folder`, or None when it is absent, belongs to another `key`, or is damaged (said aloud)."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["key"] != key:
                return None
            if any(_checksum(folder / name) != checksum for name, checksum in meta["checksums"].items()):
                raise ValueError("a checksum differs")
            starts_M1 = np.load(folder / "starts.npy")
            tokens_N = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r", shape=(int(starts_M1[-1]),))
            return cls(tokens_N, starts_M1, np.load(folder / "bytes.npy"))
        except FileNotFoundError:
            if folder.exists():
                log.warning("The tokens in %s are incomplete and are made again.", folder)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("The tokens in %s are damaged (%s) and are made again.", folder, error)
        return None


def tokenize(
    part: Documents,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    split_line_ends: float = 0.0,
    group_bytes: int = 2 << 20,
) -> TokenStore:
    """The tokens of `part`, from `cache_dir` if they were kept there for the same files and the same tokenizer.

    `progress` hears the bytes done and their (estimated) total. With `split_line_ends` that share of the tokens which
    hold signs and a line's end are written as two, so that a model also meets a line that breaks off before its end (V3
    report, section 4.1). Raises UserError when the part holds no text.
    """
    key = sha256(repr((1, part.fingerprint, part.part, tokenizer.fingerprint, split_line_ends)).encode()).hexdigest()
    folder = Path(cache_dir) / f"tokens-{part.part}-{key[:16]}"
    if (store := TokenStore.read(folder, key)) is not None:
        return store
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    loosen = _line_end_splitter(tokenizer, split_line_ends)
    starts, text_bytes, done = [0], [], 0
    with folder_beside(folder) as scratch:
        with open(scratch / "tokens.bin", "wb") as handle:
            for group in _groups(part, group_bytes):
                encoded = tokenizer.encode_batch([text for _, text in group])
                for (name, text), ids in zip(group, encoded, strict=True):
                    document = np.array([tokenizer.bos_id, *loosen(name, ids), tokenizer.eos_id], dtype)
                    handle.write(document.tobytes())
                    starts.append(starts[-1] + len(document))
                    text_bytes.append(len(text.encode()))
                    done += text_bytes[-1]
                progress(min(done, part.size), part.size)
        if not text_bytes:
            raise UserError(f"The {part.part} part of the corpus is empty", got="no document with text", do="add text")
        np.save(scratch / "starts.npy", np.array(starts, np.int64))
        np.save(scratch / "bytes.npy", np.array(text_bytes, np.int64))
        checksums = {name: _checksum(scratch / name) for name in ("tokens.bin", "starts.npy", "bytes.npy")}
        meta = {"key": key, "dtype": dtype.str, "checksums": checksums}
        (scratch / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    progress(part.size, part.size)
    store = TokenStore.read(folder, key)
    assert store is not None, "what was just written can be read"
    return store


class Batches:
    """Batches of a store by number: `batch(step)` is the same whenever and wherever it is asked for.

    A row is a window of L + 1 consecutive tokens of the store, seen as a ring of documents; the first L are inputs.
    Each epoch cuts the ring at another place and takes its windows in another order; within an epoch each token is
    met once as the next token of its row, but for fewer than L. `depths` is the number of MTP modules, J - 1. With
    `mask_documents` a token sees only its own document, else all before it in its row (as in V3's pre-training).
    """

    def __init__(
        self, store: TokenStore, row_length: int, rows_per_batch: int, depths: int, seed: int, mask_documents: bool
    ) -> None:
        if len(store) <= row_length:
            raise UserError(
                "The corpus is shorter than one row",
                got=f"{len(store)} tokens for rows of {row_length}",
                do="give more text or a smaller row_length",
            )
        self.store, self.row_length, self.rows_per_batch = store, row_length, rows_per_batch
        self.depths, self.seed, self.mask_documents = depths, seed, mask_documents
        self.rows_per_epoch = len(store) // row_length
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int) -> Batch:
        """The batch with this number, from 0; epochs follow one another without end."""
        first = step * self.rows_per_batch
        return _pack([self._row(number) for number in range(first, first + self.rows_per_batch)])

    def _row(self, number: int) -> "_Row":
        epoch, place = divmod(number, self.rows_per_epoch)
        starts = self._epoch(epoch)
        unrolled = starts[place] + np.arange(self.row_length + 1)
        turn, index = np.divmod(unrolled, len(self.store))
        documents = np.searchsorted(self.store.starts_M1, index, side="right")
        documents += turn * len(self.store.starts_M1)  # a document met again on the next turn is another one
        tokens = self.store.tokens_N[index].astype(np.int64)
        return _Row.cut(tokens, documents, self.depths, self.mask_documents)

    def _shuffled(self, epoch: int) -> Int64:
        """Where each row of an epoch starts. Raw generator output is sorted, which no version of numpy changes."""
        seeds = np.random.SeedSequence((self.seed % (1 << 64), epoch))
        draws = np.random.PCG64(seeds).random_raw(self.rows_per_epoch + 1)
        order = np.argsort(draws[1:], kind="stable")
        return int(draws[0]) % len(self.store) + order * self.row_length


def evaluation_windows(
    store: TokenStore,
    length: int,
    stride: int,
    tokens_per_batch: int = 8192,
    limit_bytes: int | None = None,
) -> tuple[Iterator[Batch], int]:
    """Batches in which each token of a document but the first is a label exactly once (J = 1), and the text's bytes.

    Each row is a window of at most `length` tokens of one document and moves on by `stride`; only its new targets are
    labels, so each is told from at least length - stride + 1 tokens, or from its whole document so far. Bits per byte
    are the sum of -log2 p over the labels (end tokens included), divided by the bytes. A batch has `tokens_per_batch`
    tokens at most, or one row. With `limit_bytes`, a fixed choice of whole documents of about that size together.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride {stride} is not between 1 and length {length}")
    documents = _choose(store, limit_bytes)

    def batches() -> Iterator[Batch]:
        rows: list[_Row] = []
        for row in _evaluation_rows(store, documents, length, stride):
            if rows and sum(len(other.tokens) for other in rows) + len(row.tokens) > tokens_per_batch:
                yield _pack(rows)
                rows = []
            rows.append(row)
        yield _pack(rows)

    return batches(), int(store.bytes_M[documents].sum())


@dataclass(frozen=True)
class _Row:
    tokens: Int64
    targets: Int64
    segments: tuple[int, ...]

    @classmethod
    def cut(cls, tokens: Int64, documents: Int64, depths: int, mask_documents: bool) -> "_Row":
        """From L + 1 tokens and the number of the document that each belongs to."""
        length = len(tokens) - 1
        targets = np.full((length, 1 + depths), IGNORE, np.int64)
        for depth in range(min(1 + depths, length)):
            same = documents[depth + 1 :] == documents[: length - depth]
            targets[: length - depth, depth] = np.where(same, tokens[depth + 1 :], IGNORE)
        borders = (np.flatnonzero(np.diff(documents[:-1])) + 1).tolist() if mask_documents else []
        return cls(tokens[:-1], targets, tuple(np.diff([0, *borders, length]).tolist()))


def _pack(rows: list[_Row]) -> Batch:
    segments = tuple(length for row in rows for length in row.segments)
    return Batch(
        tokens_T=torch.from_numpy(np.concatenate([row.tokens for row in rows])),
        targets_TJ=torch.from_numpy(np.concatenate([row.targets for row in rows])),
        positions_T=torch.cat([torch.arange(length) for length in segments]),
        rows=tuple(len(row.tokens) for row in rows),
        segments=segments,
    )


def _evaluation_rows(store: TokenStore, documents: Int64, length: int, stride: int) -> Iterator[_Row]:
    for document in documents:
        start, stop = store.starts_M1[document : document + 2]
        begin = labelled = 0  # the window's first token; the last token that has been a label
        last = int(stop - start) - 1
        while labelled < last:
            end = min(begin + length, last)
            tokens = store.tokens_N[start + begin : start + end + 1].astype(np.int64)
            row = _Row.cut(tokens, np.zeros_like(tokens), depths=0, mask_documents=False)
            row.targets[: labelled - begin] = IGNORE
            yield row
            begin, labelled = begin + stride, end


def _choose(store: TokenStore, limit_bytes: int | None) -> Int64:
    """All documents, or those that fit into `limit_bytes`, tried in a fixed shuffled order; at least the shortest."""
    documents = np.arange(len(store.bytes_M))
    if limit_bytes is None:
        return documents
    keys = np.random.PCG64(0).random_raw(len(documents))
    chosen, left = [], limit_bytes
    for document in np.argsort(keys, kind="stable"):
        if store.bytes_M[document] <= left:
            chosen.append(document)
            left -= store.bytes_M[document]
    return np.sort(np.array(chosen or [store.bytes_M.argmin()], np.int64))


def _groups(part: Documents, group_bytes: int) -> Iterator[list[tuple[str, str]]]:
    """Names and texts of documents, so many together as make good use of all cores and little memory."""
    group: list[tuple[str, str]] = []
    size = 0
    for document in part:
        group.append((document.name, document.text))
        size += len(document.text)
        if size >= group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _line_end_splitter(tokenizer: Tokenizer, share: float) -> Callable[[str, list[int]], list[int]]:
    """A function of a document's name and ids that writes `share` of the tokens "signs, line end" as two."""
    halves: dict[int, list[int]] = {}
    for token_id in range(tokenizer.vocab_size) if share else ():
        text = tokenizer.decode([token_id])
        signs = text.rstrip()
        line_end = text[len(signs) :]
        if signs and "\n" in line_end and "\ufffd" not in text and token_id not in tokenizer.control.values():
            halves[token_id] = tokenizer.encode(signs) + tokenizer.encode(line_end)

    def split(name: str, ids: list[int]) -> list[int]:
        # Drawn from the document's name, so that neither order nor grouping matters.
        seed = int.from_bytes(sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")
        draws = np.random.PCG64(seed).random_raw(len(ids)) < share * 2.0**64
        return [piece for i, drawn in zip(ids, draws, strict=True) for piece in (halves.get(i, [i]) if drawn else [i])]

    return split if halves else lambda name, ids: ids


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
