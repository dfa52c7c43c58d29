"""One optimizer step: losses and gradients of its micro-batches, update, routing biases, average.

Letters: E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cavelight.data.batches import Batch
from cavelight.model.transformer import Transformer
from cavelight.spec.sections import TrainSection
from cavelight.train import schedule
from cavelight.train.balance import Kind, update_biases
from cavelight.train.ema import Ema
from cavelight.train.loss import Losses, Weights, Whole, counts_for_step, losses, sum_by_layer
from cavelight.train.optim import Optimizer
from cavelight.train.workers import ALONE, Workers


@dataclass(frozen=True)
class StepResult:
    """Losses in nats a token before their weights; the gradient's norm before clipping; tokens an expert, [E] each.

    `mtp_losses` has one for each depth and `mtp_loss` is their mean; `balance_parts` names the balance losses that the
    recipe weighs and `balance_loss` is the sequence-wise one: 0 or empty where there is none. `skipped`: nothing was
    changed by this step.
    """

    loss: float
    mtp_losses: tuple[float, ...]
    balance_parts: Mapping[Kind, float]
    grad_norm: float
    learning_rate: float
    counts: tuple[Tensor, ...]
    skipped: bool

    @property
    def mtp_loss(self) -> float:
        return sum(self.mtp_losses) / max(len(self.mtp_losses), 1)

    @property
    def balance_loss(self) -> float:
        return self.balance_parts.get("sequence", 0.0)


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    recipe: TrainSection,
    step: int,
    progress: float,
    workers: Workers = ALONE,
    ema: Ema | None = None,
    accept: Callable[[float, float], bool] = lambda loss, grad_norm: True,
) -> StepResult:
    """Step number `step` (from 0), at a share `progress` of the run.

    Gradients summed over the micro-batches equal those of one large batch; biases move once, by all counts. When loss
    or gradient is not finite, or `accept` of the loss and the gradient's norm says no, nothing is changed at all:
    neither weights nor moments, biases or the average.
    """
    weights, whole = Weights.at(recipe, progress), Whole.of(*micro_batches)
    if "batch" in weights.balance and len(micro_batches) > 1:
        counted = workers.map(lambda batch: counts_for_step(model, batch, weights), micro_batches)
        whole = replace(whole, counts=sum_by_layer(list(counted)))
    parameters = tuple(model.parameters())

    def differentiate(batch: Batch) -> tuple[Losses, tuple[Tensor | None, ...]]:
        part = losses(model, batch, weights, whole)
        total = part.total(weights)
        return part.detach(), torch.autograd.grad(total, parameters, allow_unused=True)

    parts: list[Losses] = []
    for part, gradients in workers.map(differentiate, micro_batches):
        parts.append(part)
        optimizer.add(gradients)
        del gradients  # else they stand beside the next ones, and through the update
    norm, rate = optimizer.gradient_norm(), schedule.learning_rate(recipe, step, progress)
    result = StepResult(
        loss=sum(float(part.main) for part in parts),
        mtp_losses=tuple(sum(map(float, depth)) for depth in zip(*(part.mtp for part in parts), strict=True)),
        balance_parts={kind: sum(float(part.balance[kind]) for part in parts) for kind in parts[0].balance},
        grad_norm=float(norm),
        learning_rate=rate,
        counts=sum_by_layer([part.counts for part in parts]),
        skipped=False,
    )
    finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    if not (finite and accept(result.loss, result.grad_norm)):
        optimizer.forget()
        return replace(result, skipped=True)
    optimizer.step(rate, recipe.clip_norm, norm)
    update_biases(model, result.counts, schedule.bias_speed(recipe, progress))
    if ema is not None:
        ema.update(optimizer.masters, step)
    return result
