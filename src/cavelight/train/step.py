"""One optimizer step: losses and gradients of its micro-batches, update, routing biases.

Letters: E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.data.batches import Batch
from cavelight.model.transformer import Transformer
from cavelight.spec.recipe import TrainSection
from cavelight.train.balance import update_biases
from cavelight.train.loss import Losses, count_labels, losses
from cavelight.train.optim import Optimizer
from cavelight.train.workers import ALONE, Workers


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
    workers: Workers = ALONE,
) -> StepResult:
    """Gradients summed over the micro-batches equal those of one large batch; biases move once, by all counts."""
    labels = sum(count_labels(batch) for batch in micro_batches)
    rows = sum(len(batch.rows) for batch in micro_batches)
    weights = tuple(model.parameters())

    def differentiate(batch: Batch) -> tuple[Losses, tuple[Tensor, ...]]:
        part = losses(model, batch, labels, rows)
        total = part.total(recipe.mtp_weight, recipe.balance_alpha)
        return part.detach(), torch.autograd.grad(total, weights, materialize_grads=True)

    parts: list[Losses] = []
    for part, gradients in workers.map(differentiate, micro_batches):
        parts.append(part)
        optimizer.add(gradients)
        del gradients  # else they stand beside the next ones, and through the update
    counts = tuple(torch.stack(layer).sum(dim=0) for layer in zip(*(part.counts for part in parts), strict=True))
    grad_norm = optimizer.step(learning_rate, recipe.clip_norm)
    if math.isfinite(grad_norm):
        update_biases(model, counts, recipe.bias_speed)
    depths = sum(float(depth) for part in parts for depth in part.mtp)
    return StepResult(
        loss=sum(float(part.main) for part in parts),
        mtp_loss=depths / max(len(model.mtp), 1),
        balance_loss=sum(float(part.balance) for part in parts),
        grad_norm=grad_norm,
        counts=counts,
    )
