"""Which experts a token goes to, and with what weight (V3 report, eq. 13-16 and section 2.1.2; V2 report, 2.2).

Letters: T tokens, D hidden size, E experts, G groups of E/G experts, K experts a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cavelight.spec.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """What one layer's router decided. Balance is training's business: the model only hands this back."""

    ids_TK: Tensor  # int64, the chosen experts
    weights_TK: Tensor  # float32, their weights in the sum
    scores_TE: Tensor  # float32, every expert's unbiased score, with its gradient

    def counts(self, keep_T: Tensor | None = None) -> Tensor:
        """How many of the tokens (those where `keep_T` is true) chose each expert: int64 [E]."""
        ids = self.ids_TK if keep_T is None else self.ids_TK[keep_T]
        return torch.bincount(ids.flatten(), minlength=self.scores_TE.shape[1])


class Router(nn.Module):
    """Scores in float32, whatever the weights are stored in. The bias steers the choice and nothing else."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.config = config
        E = config.n_routed_experts or 0
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, dtype=dtype, device=device))
        biased = config.topk_method == "noaux_tc"
        bias_E = torch.zeros(E, dtype=torch.float32, device=device) if biased else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`model.to(bfloat16)` and the like leave the bias in float32: updates are smaller than bfloat16 can tell."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        sigmoid = self.config.scoring_func == "sigmoid"
        scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)
        with torch.no_grad():
            ids_TK = choose(scores_TE, self.e_score_correction_bias, self.config)
        return Routing(ids_TK, gate_weights(scores_TE.gather(1, ids_TK), self.config), scores_TE)


def choose(scores_TE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> Tensor:
    """The K experts of each token, [T, K], within its best `topk_group` groups where experts are grouped.

    A group counts by the sum of its two best biased scores (V3) or by its best score (V2's group_limited_greedy).
    Experts of other groups are out by -inf: a kept expert may well have a negative biased score.
    """
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if is_group_limited(config):
        choice_TGX = choice_TE.unflatten(1, (config.n_group, -1))
        groups_TM = group_scores(choice_TGX, config).topk(config.topk_group, dim=-1).indices
        kept_TG = torch.zeros_like(choice_TGX[..., 0], dtype=torch.bool).scatter_(1, groups_TM, True)
        choice_TE = choice_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
    return choice_TE.topk(config.num_experts_per_tok, dim=-1).indices


def is_group_limited(config: ModelConfig) -> bool:
    return config.topk_method != "greedy" and config.n_group > 1


def group_scores(choice_TGX: Tensor, config: ModelConfig) -> Tensor:
    """What each group of X experts counts, [T, G] (or with more axes before)."""
    best = 2 if config.topk_method == "noaux_tc" else 1
    return choice_TGX.topk(best, dim=-1).values.sum(dim=-1)


def gate_weights(scores_TK: Tensor, config: ModelConfig) -> Tensor:
    """The chosen experts' unbiased scores, normalised where the model does so, then scaled once."""
    if config.norm_topk_prob:
        scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return scores_TK * config.routed_scaling_factor
