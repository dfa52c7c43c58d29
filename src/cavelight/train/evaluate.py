"""How well a model predicts text that it has not seen: bits per byte, which no choice of tokenizer can flatter.

Letters: T tokens, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.data.batches import IGNORE, Batch, evaluation_windows
from cavelight.data.store import TokenStore
from cavelight.data.tokenizer import Tokenizer
from cavelight.errors import UserError
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.run.cache import LatentCache
from cavelight.run.rows import CacheDtype, cache_dtype
from cavelight.spec.events import Event, Phase
from cavelight.train.passage import hidden_of
from cavelight.train.workers import ALONE, Workers

TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 512  # tokens, since each has a whole vocabulary of them


def held_out_bits_per_byte(
    model: Transformer,
    store: TokenStore,
    context: int,
    limit_bytes: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    workers: Workers = ALONE,
) -> float:
    """Bits for each UTF-8 byte of the store's documents, or of a fixed choice of about `limit_bytes` of them.

    Every token is predicted once, the end of its document included, from up to `context` tokens of the same document
    and from half as many at least, where there are so many.
    """

    @torch.inference_mode()
    def nats_of(batch: Batch) -> tuple[float, int]:
        hidden_TD, _ = model(batch.tokens_T, batch.positions_T, PackedAttend(batch.segments), GroupedDispatch())
        labels_T = batch.targets_TJ[:, 0]
        labelled_T = labels_T != IGNORE
        nats = sum(float(nll_T.sum()) for nll_T in _nll(model, hidden_TD[labelled_T], labels_T[labelled_T]))
        return nats, int(labelled_T.sum())

    batches, text_bytes = evaluation_windows(
        store, context, max(context // 2, 1), tokens_per_batch=TOKENS_AT_ONCE, limit_bytes=limit_bytes
    )
    nats, told = 0.0, 0
    for batch_nats, labels in workers.map(nats_of, batches):
        nats, told = nats + batch_nats, told + labels
        if limit_bytes is None:
            on_event(Phase("evaluating", told, len(store) - len(store.bytes_M), "tokens"))
    return nats / math.log(2) / text_bytes


@dataclass(frozen=True)
class Bucket:
    """Predictions from `first` to `last` tokens of context: their nats together, their number, their text's bytes."""

    first: int
    last: int
    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@torch.inference_mode()
def loss_by_position(
    model: Transformer,
    tokenizer: Tokenizer,
    store: TokenStore,
    length: int,
    rows: int = 16,
    on_event: Callable[[Event], None] = lambda event: None,
    *,
    cache: CacheDtype = "auto",
) -> list[Bucket]:
    """What context is worth: held-out loss by the number of tokens that a prediction is made from.

    The past is read from a latent cache, of which `cache` says what it is kept in.

    At most `rows` rows of `length` tokens, spread evenly over the store, in which document follows document, as in
    training without masks. The first bucket is 1 to 15 tokens, each further one twice as wide. Raises UserError for a
    store shorter than a row, and for more tokens than the model takes.
    """
    _check_length(model, store, length)
    rows = min(rows, (len(store) - 1) // length)
    edges = [1, *(edge for edge in (1 << n for n in range(4, 40)) if edge <= length), length + 1]
    sizes_V = _text_bytes(tokenizer, model.config.vocab_size)
    nats_T, bytes_T = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
    rows_in = cache_dtype(model.config, model.lm_head.weight.dtype, cache)
    latents = LatentCache(model.config, length, rows_in)
    for row, start in enumerate(torch.linspace(0, len(store) - length - 1, rows).long().tolist()):
        on_event(Phase("evaluating by position", row, rows, "rows"))
        tokens = store.tokens_N[start : start + length + 1].astype("int64").tolist()
        labels_T = torch.tensor(tokens[1:])
        bytes_T += sizes_V[labels_T]
        for first, hidden_TD in hidden_of(model, latents, tokens[:-1]):
            end = first + len(hidden_TD)
            nats_T[first:end] += torch.cat(list(_nll(model, hidden_TD, labels_T[first:end])))
    on_event(Phase("evaluating by position", rows, rows, "rows"))
    return [
        Bucket(a, b - 1, float(nats_T[a - 1 : b - 1].sum()), rows * (b - a), int(bytes_T[a - 1 : b - 1].sum()))
        for a, b in pairwise(edges)
        if b > a
    ]


def _nll(model: Transformer, hidden_TD: Tensor, labels_T: Tensor) -> Iterator[Tensor]:
    """-log p of each label, in nats, a few tokens at a time."""
    for hidden, labels in zip(hidden_TD.split(LOGITS_AT_ONCE), labels_T.split(LOGITS_AT_ONCE), strict=True):
        yield F.cross_entropy(model.head(hidden), labels, reduction="none")


def _text_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """UTF-8 bytes of each token's text, [V]; control tokens have none."""
    control = set(tokenizer.control.values())
    return torch.tensor([0 if i in control else _size(tokenizer, i) for i in range(vocab_size)])


def _size(tokenizer: Tokenizer, token: int) -> int:
    return len(tokenizer.bytes_of(token) if tokenizer.is_byte_level else tokenizer.decode([token]).encode())


def _check_length(model: Transformer, store: TokenStore, length: int) -> None:
    reach = model.config.max_position_embeddings
    if length > reach:
        raise UserError(
            "The model does not reach so far",
            got=f"{length:,} tokens",
            why=f"its max_position_embeddings is {reach:,}",
            do="extend it first (cavelight extend), or ask for fewer",
        )
    if len(store) <= length:
        raise UserError(
            "The held-out text is shorter than one context",
            got=f"{len(store):,} tokens for contexts of {length:,}",
            do="name more text with --data",
        )
