"""One optimizer step: losses of its micro-batches, gradients, update, routing biases.

Letters: E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.data.batches import Batch
from cavelight.model.transformer import Transformer
from cavelight.spec.recipe import TrainSection
from cavelight.train.balance import update_biases
from cavelight.train.loss import count_labels, losses
from cavelight.train.optim import Optimizer


@dataclass(frozen=True)
class StepResult:
    """Losses in nats a token before their weights; the gradient's norm before clipping; tokens an expert, [E] each."""

    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    counts: tuple[Tensor, ...]


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    recipe: TrainSection,
    learning_rate: float,
) -> StepResult:
    """Gradients summed over the micro-batches equal those of one large batch; biases move once, by all counts."""
    labels = sum(count_labels(batch) for batch in micro_batches)
    rows = sum(len(batch.rows) for batch in micro_batches)
    loss, mtp_loss, balance_loss = 0.0, 0.0, 0.0
    counts: list[Tensor] = []
    for batch in micro_batches:
        part = losses(model, batch, labels, rows)
        torch.autograd.backward(part.total(recipe.mtp_weight, recipe.balance_alpha))
        loss += float(part.main.detach())
        mtp_loss += sum(float(depth.detach()) for depth in part.mtp) / max(len(part.mtp), 1)
        balance_loss += float(part.balance.detach())
        counts = [a + b for a, b in zip(counts, part.counts, strict=True)] if counts else list(part.counts)
    grad_norm = optimizer.step(learning_rate, recipe.clip_norm)
    update_biases(model, counts, recipe.bias_speed)
    return StepResult(loss, mtp_loss, balance_loss, grad_norm, tuple(counts))
