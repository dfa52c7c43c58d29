"""Documents to what a token store holds of them.

Letters: N tokens, M documents, V vocabulary. Whatever is drawn is drawn from a document's name, so that neither the
order of documents nor how they are grouped matters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cavelight.data.fim import FimTokens, cut_for_fim
from cavelight.data.read import Document
from cavelight.data.tokenizer import Tokenizer

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Manner:
    """How documents are written. `split_line_ends`: share of the tokens with signs and a line's end that are written
    as two, so that a model also meets a line that breaks off there. `fim_rate`: share of the documents whose middle is
    told last. Both as in the V3 report, section 4.1; neither for text that is held out."""

    split_line_ends: float = 0.0
    fim_rate: float = 0.0


@dataclass(frozen=True)
class Encoded:
    """Documents one after another: `tokens_N` (uint16 or uint32), their `lengths_M` in it, `bytes_M` of their texts."""

    tokens_N: NDArray[Any]
    lengths_M: Int64
    bytes_M: Int64


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Encoder:
    """Each document becomes the beginning token, its text, the end token. Raises UserError if FIM lacks its tokens."""

    def __init__(self, tokenizer: Tokenizer, manner: Manner) -> None:
        self.manner, self.dtype = manner, token_dtype(tokenizer.vocab_size)
        self._begin, self._end = tokenizer.bos_id, tokenizer.eos_id
        self._tokenizer = tokenizer
        self._fim = FimTokens.of(tokenizer) if manner.fim_rate else None
        self._halves = _halves(tokenizer, self.dtype) if manner.split_line_ends else {}
        self._divisible_V = np.zeros(tokenizer.vocab_size, bool)
        self._divisible_V[list(self._halves)] = True

    def encode(self, documents: Iterable[Document]) -> Encoded:
        empty = np.zeros(0, self.dtype)
        arrays, text_bytes = [], []
        for document in documents:
            arrays.append(self._tokens(document))
            text_bytes.append(len(document.text.encode()))
        lengths = np.array([len(array) for array in arrays], np.int64)
        return Encoded(np.concatenate([empty, *arrays]), lengths, np.array(text_bytes, np.int64))

    def _tokens(self, document: Document) -> NDArray[Any]:
        digest = sha256(document.name.encode("utf-8", "surrogateescape")).digest()
        line_ends, *fim = (int.from_bytes(digest[start : start + 8], "little") for start in range(0, 32, 8))
        parts = cut_for_fim(document.text, (fim[0], fim[1], fim[2]), self.manner.fim_rate) if self._fim else None
        if self._fim and parts:
            beginning, middle, end = self._ids(*parts)
            marks = self._marks(self._fim.prefix, self._fim.suffix, self._fim.middle)
            ids = np.concatenate([marks[:1], beginning, marks[1:2], end, marks[2:], middle])
        else:
            (ids,) = self._ids(document.text)
        ids = self._split_line_ends(ids, line_ends)
        return np.concatenate([self._marks(self._begin), ids, self._marks(self._end)])

    def _split_line_ends(self, ids: NDArray[Any], seed: int) -> NDArray[Any]:
        if not self._halves:
            return ids
        drawn = np.random.PCG64(seed).random_raw(len(ids)) < self.manner.split_line_ends * 2.0**64
        chosen = np.flatnonzero(drawn & self._divisible_V[ids])
        pieces, start = [], 0
        for place in chosen.tolist():
            pieces += [ids[start:place], self._halves[int(ids[place])]]
            start = place + 1
        return np.concatenate([*pieces, ids[start:]])

    def _ids(self, *texts: str) -> list[NDArray[Any]]:
        return [np.array(ids, self.dtype) for ids in self._tokenizer.encode_batch(texts)]

    def _marks(self, *ids: int) -> NDArray[Any]:
        return np.array(ids, self.dtype)


def _halves(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> dict[int, NDArray[Any]]:
    """For each token "signs, line end" the ids of the signs and of the line's end."""
    halves: dict[int, NDArray[Any]] = {}
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id])
        signs = text.rstrip()
        line_end = text[len(signs) :]
        if signs and "\n" in line_end and "\ufffd" not in text and token_id not in tokenizer.control.values():
            halves[token_id] = np.array(tokenizer.encode(signs) + tokenizer.encode(line_end), dtype)
    return halves
