"""What training minimises: next token, further tokens (MTP), and the balance within each sequence.

Letters: T tokens of all rows in one row, J prediction depths (1 + MTP modules), D hidden size, V vocabulary,
E experts, K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.data.batches import IGNORE, Batch
from cavelight.kernels import cross_entropy
from cavelight.model.ports import Attend, Dispatch, GroupedDispatch, PackedAttend
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.train.balance import sequence_balance_loss


@dataclass(frozen=True)
class Losses:
    """One micro-batch's losses, and how many tokens chose each expert (int64, one [E] a MoE layer, MTP's last)."""

    main: Tensor  # sum of -log p over the labels, divided by the step's labels
    mtp: tuple[Tensor, ...]  # the same for each depth, divided by the same number: V3 report, eq. 24
    balance: Tensor  # sum over MoE layers of the mean over the step's rows, before alpha: V3 report, eq. 17-20
    counts: tuple[Tensor, ...]

    def detach(self) -> "Losses":
        return Losses(self.main.detach(), tuple(d.detach() for d in self.mtp), self.balance.detach(), self.counts)

    def total(self, mtp_weight: float, balance_alpha: float) -> Tensor:
        """L_main + lambda / D sum_k L_k + alpha L_balance (V3 report, eq. 25 and 17)."""
        total = self.main + balance_alpha * self.balance
        return total + mtp_weight / len(self.mtp) * torch.stack(self.mtp).sum() if self.mtp else total


def losses(
    model: Transformer,
    batch: Batch,
    labels: int | None = None,
    rows: int | None = None,
    attend: Attend | None = None,
    dispatch: Dispatch | None = None,
) -> Losses:
    """Losses of one micro-batch.

    `labels` and `rows` are the next-token labels and the rows of the whole step, by which sums are divided so that
    micro-batches add up to the step; by default this batch is the step. A label never lies beyond its document's
    end; positions without a label at some depth count neither in that depth's loss nor in its module's balance.
    """
    attend = attend or PackedAttend(batch.segments)
    dispatch = dispatch or GroupedDispatch()
    labels = labels if labels is not None else count_labels(batch)
    rows = rows if rows is not None else len(batch.rows)
    hidden_TD, routings = model(batch.tokens_T, batch.positions_T, attend, dispatch)
    main = _nll(model.head(hidden_TD), batch.targets_TJ[:, 0]) / labels
    by_score = model.config.topk_method == "noaux_tc"
    balance, counts = _balance(routings, batch.rows, None, rows, by_score)
    mtp = []
    for depth in range(len(model.mtp)):
        label_T = batch.targets_TJ[:, depth + 1]
        next_T = batch.tokens_T.roll(-depth - 1)  # wrong only at a row's end, where no label follows and nobody looks
        hidden_TD, routings = model.draft(depth, hidden_TD, next_T, batch.positions_T, attend, dispatch)
        mtp.append(_nll(model.draft_head(depth, hidden_TD), label_T) / labels)
        module_balance, module_counts = _balance(routings, batch.rows, label_T != IGNORE, rows, by_score)
        balance, counts = balance + module_balance, counts + module_counts
    return Losses(main, tuple(mtp), balance, counts)


def count_labels(batch: Batch) -> int:
    return int((batch.targets_TJ[:, 0] != IGNORE).sum())


def _nll(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return cross_entropy.fused(logits_TV, labels_T, IGNORE)


def _balance(
    routings: Sequence[Routing], lengths: Sequence[int], keep_T: Tensor | None, rows: int, by_score: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    parts = [sequence_balance_loss(routing, lengths, keep_T, by_score=by_score) / rows for routing in routings]
    return torch.stack(parts).sum() if parts else torch.zeros(()), tuple(r.counts(keep_T) for r in routings)
