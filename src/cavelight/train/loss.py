"""What training minimises: next token, further tokens (MTP), and balance among the experts.

Letters: T tokens of all rows in one row, J prediction depths (1 + MTP modules), D hidden size, V vocabulary,
E experts, K experts a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cavelight.data.batches import IGNORE, Batch
from cavelight.kernels.norm import outputs_remade
from cavelight.model.ports import Attend, Dispatch, GroupedDispatch, PackedAttend
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.spec.sections import TrainSection
from cavelight.train import schedule
from cavelight.train.balance import Kind, Rows, Rules, balance_losses, counted, routers


@dataclass(frozen=True)
class Weights:
    """What the parts of the loss weigh at some point of a run. What weighs nothing is not computed.

    `mtp` is lambda, `balance` the alphas; the defaults are the report's first ones. `devices`: over how many devices
    the device and communication losses see the experts spread.
    """

    mtp: float = 0.3
    balance: Mapping[Kind, float] = field(default_factory=lambda: {"sequence": 1e-4})
    devices: int = 1

    @classmethod
    def at(cls, recipe: TrainSection, progress: float) -> "Weights":
        alphas: dict[Kind, float] = {
            "sequence": recipe.balance_alpha,
            "expert": recipe.expert_alpha,
            "device": recipe.device_alpha,
            "communication": recipe.communication_alpha,
            "batch": recipe.batch_alpha,
        }
        wanted = {kind: alpha for kind, alpha in alphas.items() if alpha}
        return cls(schedule.mtp_weight(recipe, progress), wanted, recipe.balance_devices)


@dataclass(frozen=True)
class Whole:
    """The step that a micro-batch belongs to: by what its sums are divided, so that micro-batches add up to it.

    `counts`: tokens that count for each expert in the batch loss, int64 [E] a MoE layer, MTP's last; None where that
    loss is not wanted or the micro-batch is the step.
    """

    labels: int  # for the next token
    rows: int
    counts: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, *micro_batches: Batch) -> "Whole":
        labels = sum(int((batch.targets_TJ[:, 0] != IGNORE).sum()) for batch in micro_batches)
        return cls(labels, sum(len(batch.rows) for batch in micro_batches))


@dataclass(frozen=True)
class Losses:
    """One micro-batch's losses, and how many tokens chose each expert (int64, one [E] a MoE layer, MTP's last)."""

    main: Tensor  # sum of -log p over the labels, divided by the step's labels
    mtp: tuple[Tensor, ...]  # the same for each depth, divided by the same number: V3 report, eq. 24
    balance: Mapping[Kind, Tensor]  # sums over MoE layers of the mean over the step's rows, before their alphas
    counts: tuple[Tensor, ...]

    def detach(self) -> "Losses":
        balance = {kind: loss.detach() for kind, loss in self.balance.items()}
        return Losses(self.main.detach(), tuple(d.detach() for d in self.mtp), balance, self.counts)

    def total(self, weights: Weights) -> Tensor:
        """L_main + sum of alpha L_balance + lambda / D sum_k L_k (V3 report, eq. 25 and 17)."""
        total = self.main
        for kind, loss in self.balance.items():
            total = total + weights.balance[kind] * loss
        return total + weights.mtp / len(self.mtp) * torch.stack(self.mtp).sum() if self.mtp else total


@dataclass(frozen=True)
class _Depth:
    """What the trunk (depth 0) or an MTP module made of a batch; `keep_T` are the tokens that count, None for all."""

    hidden_TD: Tensor
    routings: Sequence[Routing]
    labels_T: Tensor
    keep_T: Tensor | None


@outputs_remade()
def losses(
    model: Transformer,
    batch: Batch,
    weights: Weights | None = None,
    step: Whole | None = None,
    attend: Attend | None = None,
    dispatch: Dispatch | None = None,
) -> Losses:
    """Losses of one micro-batch; by default it is the whole step, and the weights are the report's.

    A label never lies beyond its document's end; positions without a label at some depth count neither in that depth's
    loss nor in its module's balance. Where lambda is 0 the modules are not run, and none of their experts is counted.
    """
    weights, step = weights or Weights(), step or Whole.of(batch)
    rows = Rows.of(batch.rows, batch.tokens_T.device)
    rules = Rules.of(model.config, weights.devices)
    step_counts = iter(step.counts or ())
    nll: list[Tensor] = []
    balance: dict[Kind, Tensor] = {}
    counts: list[Tensor] = []
    for depth, made in enumerate(_depths(model, batch, weights, attend, dispatch)):
        head = partial(model.draft_nll, depth - 1) if depth else model.nll
        nll.append(head(made.hidden_TD, made.labels_T) / step.labels)
        for routing in made.routings:
            counts.append(routing.counts(made.keep_T))
            parts = balance_losses(routing, weights.balance, rows, rules, made.keep_T, next(step_counts, None))
            for kind, part in parts.items():
                share = part if kind == "batch" else part / step.rows
                balance[kind] = balance[kind] + share if kind in balance else share
    left = routers(model)[len(counts) :]
    counts += [torch.zeros(len(router.weight), dtype=torch.int64, device=router.weight.device) for router in left]
    return Losses(nll[0], tuple(nll[1:]), balance, tuple(counts))


@torch.no_grad()
def counts_for_step(model: Transformer, batch: Batch, weights: Weights) -> tuple[Tensor, ...]:
    """One micro-batch's part of `Whole.counts`: a forward pass more, since f must be known before any backward."""
    rules = Rules.of(model.config, weights.devices)
    return tuple(
        counted(routing, rules, made.keep_T)
        for made in _depths(model, batch, weights, None, None)
        for routing in made.routings
    )


def sum_by_layer(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Counts of all micro-batches, from those of each."""
    return tuple(torch.stack(layer).sum(dim=0) for layer in zip(*parts, strict=True))


def _depths(
    model: Transformer, batch: Batch, weights: Weights, attend: Attend | None, dispatch: Dispatch | None
) -> Iterator[_Depth]:
    attend = attend or PackedAttend(batch.segments)
    dispatch = dispatch or GroupedDispatch()
    hidden_TD, routings = model(batch.tokens_T, batch.positions_T, attend, dispatch)
    yield _Depth(hidden_TD, routings, batch.targets_TJ[:, 0], None)
    for module in range(len(model.mtp) if weights.mtp else 0):
        labels_T = batch.targets_TJ[:, module + 1]
        next_T = batch.tokens_T.roll(-module - 1)  # wrong only at a row's end, where no label follows and nobody looks
        hidden_TD, routings = model.draft(module, hidden_TD, next_T, batch.positions_T, attend, dispatch)
        yield _Depth(hidden_TD, routings, labels_T, labels_T != IGNORE)
