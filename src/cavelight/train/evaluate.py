"""How well a model predicts text that it has not seen: bits per byte, which no choice of tokenizer can flatter.

Letters: T tokens, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from cavelight.data.batches import IGNORE, Batch, TokenStore, evaluation_windows
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.spec.events import Event, Phase
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
        told = zip(hidden_TD[labelled_T].split(LOGITS_AT_ONCE), labels_T[labelled_T].split(LOGITS_AT_ONCE), strict=True)
        nats = sum(float(F.cross_entropy(model.head(hidden), labels, reduction="sum")) for hidden, labels in told)
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
