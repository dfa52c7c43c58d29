"""Keeping experts evenly busy: the bias that steers the choice, and the small loss within each sequence.

Letters: T tokens, B rows, E experts, K experts a token.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cavelight.model.router import Router, Routing
from cavelight.model.transformer import Transformer


def sequence_balance_loss(
    routing: Routing, lengths: Sequence[int], keep_T: Tensor | None = None, *, by_score: bool = True
) -> Tensor:
    """sum over rows of sum_i f_i P_i (V3 report, eq. 17-20, before alpha).

    f_i = E / (K T) times the row's tokens that have expert i among their K best, P_i the mean of its normalised score
    over the row. `by_score`: the best by plain scores, as eq. 18 has it, whatever bias and groups then choose; V2
    counts what was chosen instead (V2 report, eq. 23-25). Tokens where `keep_T` is false are no part of their row.
    """
    scores_TE = routing.scores_TE / routing.scores_TE.sum(dim=-1, keepdim=True)
    best_TK = scores_TE.detach().topk(routing.ids_TK.shape[1], dim=-1).indices if by_score else routing.ids_TK
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, best_TK, 1.0)
    if keep_T is not None:
        scores_TE, chosen_TE = scores_TE * keep_T[:, None], chosen_TE * keep_T[:, None]
    row_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(scores_TE.device)
    E, K = scores_TE.shape[1], routing.ids_TK.shape[1]
    zeros_BE = scores_TE.new_zeros(len(lengths), E)
    chosen_BE, scores_BE = zeros_BE.index_add(0, row_T, chosen_TE), zeros_BE.index_add(0, row_T, scores_TE)
    tokens_B1 = chosen_BE.sum(dim=1, keepdim=True).clamp(min=K) / K
    f_BE, p_BE = chosen_BE * E / (K * tokens_B1), scores_BE / tokens_B1
    return (f_BE * p_BE).sum()


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
