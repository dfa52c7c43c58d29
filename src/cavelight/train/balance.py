"""Keeping experts evenly busy: the bias that steers the choice, and the losses that may stand beside or instead of it.

Letters: T tokens, B rows, E experts, K experts a token, G devices of E/G experts each.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cavelight.model.router import Router, Routing, is_group_limited
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig

Kind = Literal["sequence", "expert", "device", "communication", "batch"]


@dataclass(frozen=True)
class Rules:
    """How a model's balance losses count.

    `by_score`: the sequence and batch losses count the K best plain scores, as V3's eq. 18 has it, whatever bias and
    groups then choose; with V2's gates they count what was chosen. `devices` are G; `reach` is M, the devices that a
    token is sent to at most.
    """

    by_score: bool
    devices: int
    reach: int

    @classmethod
    def of(cls, config: ModelConfig, devices: int) -> "Rules":
        reach = min(devices, config.num_experts_per_tok)
        if is_group_limited(config):
            reach = min(reach, max(config.topk_group, config.topk_group * devices // config.n_group))
        return cls(config.topk_method == "noaux_tc", devices, reach)


@dataclass(frozen=True)
class Rows:
    """Which row each token lies in."""

    row_T: Tensor
    count: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Rows":
        return cls(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device), len(lengths))

    def sums(self, values_TX: Tensor) -> Tensor:
        return values_TX.new_zeros(self.count, values_TX.shape[1]).index_add(0, self.row_T, values_TX)


def balance_losses(
    routing: Routing,
    kinds: Collection[Kind],
    rows: Rows,
    rules: Rules,
    keep_T: Tensor | None = None,
    step_counts_E: Tensor | None = None,
) -> dict[Kind, Tensor]:
    """One MoE layer's losses of the wanted kinds, before their weights; all but the last are sums over the rows.

    With P_i the mean of expert i's normalised score over a row, and f_i = E / (K T) times the row's tokens that count
    for it, each is a sum of f P:

    - sequence: over experts, the tokens counted as `rules.by_score` says (V3 report, eq. 17-20);
    - expert: over experts, by the actual choice (V2 report, eq. 23-25);
    - device: over devices, f the mean of their experts' and P the sum (V2 report, eq. 26-28);
    - communication: over devices, f = G / (M T) times the tokens sent there, P as before (V2 report, eq. 29-31);
    - batch: as sequence, with the whole step for one row (V3 report, section 4.5.3). f is made from the step's
      `step_counts_E` (sums of `counted`; by default of these tokens alone), and P divided by the step's tokens, so
      that micro-batches add up to the step.

    Tokens where `keep_T` is false are no part of their row.
    """
    if not kinds:
        return {}
    E, K, G = routing.scores_TE.shape[1], routing.ids_TK.shape[1], rules.devices

    def kept(values_TX: Tensor) -> Tensor:
        return values_TX if keep_T is None else values_TX * keep_T[:, None]

    scores_BE = rows.sums(kept(routing.scores_TE / routing.scores_TE.sum(dim=-1, keepdim=True)))
    tokens_B1 = rows.sums(kept(torch.ones_like(routing.scores_TE[:, :1]))).clamp(min=1)
    p_BE = scores_BE / tokens_B1

    def f_BE(ids_TK: Tensor) -> Tensor:
        return rows.sums(kept(_marks(ids_TK, E))) * E / (tokens_B1 * K)

    def p_BG() -> Tensor:
        return p_BE.view(-1, G, E // G).sum(dim=2)

    def device() -> Tensor:
        return (f_BE(routing.ids_TK).view(-1, G, E // G).mean(dim=2) * p_BG()).sum()

    def communication() -> Tensor:
        sent_BG = rows.sums(kept(_marks(routing.ids_TK // (E // G), G)))
        return (sent_BG * G / (tokens_B1 * rules.reach) * p_BG()).sum()

    def batch() -> Tensor:
        counts_E = counted(routing, rules, keep_T) if step_counts_E is None else step_counts_E
        tokens = counts_E.sum().clamp(min=K) / K
        return (counts_E * E / (tokens * K) * scores_BE.sum(dim=0) / tokens).sum()

    made: dict[Kind, Callable[[], Tensor]] = {
        "sequence": lambda: (f_BE(_counted(routing, rules)) * p_BE).sum(),
        "expert": lambda: (f_BE(routing.ids_TK) * p_BE).sum(),
        "device": device,
        "communication": communication,
        "batch": batch,
    }
    return {kind: made[kind]() for kind in kinds}


def counted(routing: Routing, rules: Rules, keep_T: Tensor | None = None) -> Tensor:
    """How many tokens count for each expert in the batch loss: int64 [E]."""
    ids_TK = _counted(routing, rules)
    ids_TK = ids_TK if keep_T is None else ids_TK[keep_T]
    return torch.bincount(ids_TK.flatten(), minlength=routing.scores_TE.shape[1])


def _counted(routing: Routing, rules: Rules) -> Tensor:
    if not rules.by_score:
        return routing.ids_TK
    return routing.scores_TE.detach().topk(routing.ids_TK.shape[1], dim=-1).indices


def _marks(ids_TK: Tensor, among: int) -> Tensor:
    """One where an id is among a token's K, however often: float32 [T, among]."""
    return torch.zeros(ids_TK.shape[0], among, device=ids_TK.device).scatter_(1, ids_TK, 1.0)


def routers(model: Transformer) -> list[Router]:
    """All routers in the order in which a step's counts come: the trunk's layers, then the MTP modules'."""
    return [module for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def update_biases(model: Transformer, counts: Iterable[Tensor], speed: float) -> None:
    """Once a step: raise the bias of experts below the mean load by `speed`, lower it above (V3 report, 2.1.2).

    In place and in float32, from integer counts, so that checkpoints see it and no rounding flips a sign.
    """
    for router, counts_E in zip(routers(model), counts, strict=True):
        if router.e_score_correction_bias is not None:
            # mean - count, times E to stay in integers
            deficit_E = counts_E.sum() - counts_E * counts_E.numel()
            router.e_score_correction_bias += speed * deficit_E.sign()


def max_violation(counts_E: Tensor) -> float:
    """MaxVio: the busiest expert's load over the mean, minus one (arXiv 2408.15664); 0 is even."""
    total = int(counts_E.sum())
    return int(counts_E.max()) * counts_E.numel() / total - 1 if total else 0.0
