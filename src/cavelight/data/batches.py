"""The batches that training and evaluation read from token stores.

Letters: N tokens of a store, M documents, T tokens of one batch (all rows laid end to end), L tokens of one row,
J prediction depths (1 + MTP modules).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cavelight.data.mixture import Draw, Mixture
from cavelight.data.shuffle import Permutation
from cavelight.data.store import TokenStore
from cavelight.errors import UserError

IGNORE = -100  # a target that is no label: beyond its document or its row

Int64 = NDArray[np.int64]


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


class Batches:
    """Rows of a mixture by number: each is the same whenever and wherever it is asked for.

    A row is a window of L + 1 consecutive tokens of one store, seen as a ring of documents; the first L are inputs.
    Each epoch of a store cuts the ring at another place and takes its windows in another order; within an epoch each
    token is met once as the next token of its row, but for fewer than L. Of any number of rows from the first on, each
    store has its share by the mixture's weights (`Draw`), and goes through epochs of its own. `depths` is the number
    of MTP modules, J - 1. With `mask_documents` a token sees only its own document, else all before it in its row (as
    in V3's pre-training).
    """

    def __init__(self, mixture: Mixture, row_length: int, depths: int, seed: int, mask_documents: bool) -> None:
        for store in mixture.stores:
            if len(store) <= row_length:
                raise UserError(
                    "The corpus is shorter than one row",
                    got=f"{len(store)} tokens for rows of {row_length}",
                    do="give more text or a smaller row_length",
                )
        self.row_length, self.depths, self.mask_documents = row_length, depths, mask_documents
        self._draw = Draw(mixture.weights)
        self._rings = [_Ring(store, row_length, (seed, number)) for number, store in enumerate(mixture.stores)]

    def rows(self, first: int, count: int) -> Batch:
        """`count` rows from number `first` on; they never end. Any thread may ask."""
        return _pack([self._row(number) for number in range(first, first + count)])

    def _row(self, number: int) -> "_Row":
        source, place = self._draw(number)
        return _Row.cut(*self._rings[source].window(place), self.depths, self.mask_documents)


class _Ring:
    """A store's documents end to end, the first after the last, cut into windows of `length` anew in each epoch."""

    def __init__(self, store: TokenStore, length: int, key: tuple[int, int]) -> None:
        self.store, self.length, self.key = store, length, key
        self.windows = len(store) // length
        self._epoch = lru_cache(maxsize=4)(self._begun)

    def window(self, number: int) -> tuple[Int64, Int64]:
        """The tokens of window `number` and the one that follows, and the number of each one's document."""
        epoch, place = divmod(number, self.windows)
        start, shuffle = self._epoch(epoch)
        begin = (start + shuffle(place) * self.length) % len(self.store)
        tokens, documents = self._span(begin, min(begin + self.length + 1, len(self.store)))
        if missing := self.length + 1 - len(tokens):
            others, met_again = self._span(0, missing)
            # A document met again on the next turn is another one.
            tokens = np.concatenate([tokens, others])
            documents = np.concatenate([documents, met_again + len(self.store.bytes_M)])
        return tokens, documents

    def _span(self, begin: int, end: int) -> tuple[Int64, Int64]:
        tokens = self.store.tokens_N[begin:end].astype(np.int64)
        first, last = np.searchsorted(self.store.starts_M1, (begin, end - 1), side="right")
        borders = np.clip(self.store.starts_M1[first - 1 : last + 1], begin, end)
        return tokens, np.repeat(np.arange(first - 1, last), np.diff(borders))

    def _begun(self, epoch: int) -> tuple[int, Permutation]:
        """Where an epoch cuts the ring, and the order of its windows."""
        key = (*self.key, epoch)
        start = int.from_bytes(sha256(repr(("start", key)).encode()).digest()[:8], "little") % len(self.store)
        return start, Permutation(self.windows, key)


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
