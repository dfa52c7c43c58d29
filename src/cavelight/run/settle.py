"""Near-ties under greedy decoding, settled the same way whatever the batch looked like.

Letters: T tokens, D hidden size, E experts, K experts a token, G groups of experts, X experts of a group, V vocabulary,
O mixture layers in order.

The last bits of a row depend on how many rows were computed with it. That matters at two places only, where a choice
hangs on which of two numbers is larger: the router's and the last one, of the token. A position where either is
closer than rounding can move it is computed once more, in a way that depends on the tokens alone; so decoding one by
one and verifying drafts end in the same tokens. Rounding moves less than half of these bounds in float32. In bfloat16
it moves so much that ties would be everywhere: there nothing is settled, and the two may part at a near-tie.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cavelight.model.moe import MoE
from cavelight.model.ports import Dispatch
from cavelight.model.router import Routing, group_scores, is_group_limited
from cavelight.model.transformer import Transformer
from cavelight.run.cache import LatentCache
from cavelight.spec.config import ModelConfig

# The most that was seen to move between batches of 1 and of 2 to 64 rows, over 400 positions of a random model of the
# demo's size: 4.7e-6 of the largest logit, 2.8e-6 of a routing score (and a group's score is the sum of two).
LOGIT_TIE = 5e-5  # of the largest logit
SCORE_TIE = 4e-5
BLOCK = 64  # positions that a settlement computes at once


def is_close(scores_V: Tensor) -> bool:
    """Whether rounding might decide which token is the likeliest."""
    if len(scores_V) == 1:
        return False
    first, second = scores_V.topk(2).values.tolist()  # the second is minus infinity where one token alone is allowed
    return bool(first - second < LOGIT_TIE * scores_V[scores_V.isfinite()].abs().max())


class Settler:
    """Computes single positions of one sequence anew: a function of its tokens and the length of its prompt.

    The prompt's rows are taken as they are: every way of decoding computes them alike. After it, whole blocks of
    positions are computed once, the rest up to the position in question each time, in a cache of its own.
    """

    def __init__(self, model: Transformer, cache: LatentCache, dispatch: Dispatch, prompt: int) -> None:
        self.model, self.cache, self.dispatch = model, cache, dispatch
        self.prompt = self.done = prompt
        self.own: LatentCache | None = None
        routers = [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp, MoE)]
        biases = [router.e_score_correction_bias for router in routers if router.e_score_correction_bias is not None]
        self.bias_OE = torch.stack(biases) if biases else None

    def close_routes(self, routings: Sequence[Routing], tokens: int) -> list[bool]:
        """For each of a step's `tokens`, whether rounding might have sent it to other experts in any layer."""
        if not routings:
            return [False] * tokens
        scores_OTE = torch.stack([routing.scores_TE for routing in routings])
        if self.bias_OE is not None:
            scores_OTE = scores_OTE + self.bias_OE[:, None]
        close: list[bool] = (route_margin(scores_OTE, self.model.config).amin(dim=0) < SCORE_TIE).tolist()
        return close

    def settle(self, tokens: Sequence[int], position: int) -> Tensor:
        """The hidden state [1, D] at `position`, after `tokens` up to there; puts its rows into the cache."""
        if self.own is None:
            self.own = LatentCache(
                self.model.config, position + 1, self.cache.rows_MSW.dtype, self.cache.rows_MSW.device
            )
            self.own.rows_MSW[:, : self.prompt] = self.cache.rows_MSW[:, : self.prompt]
        while self.done + BLOCK <= position:
            self._compute(self.own, tokens, self.done + BLOCK)
            self.done += BLOCK
        hidden_TD = self._compute(self.own, tokens, position + 1)
        layers = slice(self.model.config.num_hidden_layers)
        self.cache.rows_MSW[layers, position] = self.own.rows_MSW[layers, position]
        return hidden_TD[-1:]

    def _compute(self, cache: LatentCache, tokens: Sequence[int], end: int) -> Tensor:
        device = cache.rows_MSW.device
        positions_T = torch.arange(self.done, end, device=device)
        tokens_T = torch.tensor(tokens[self.done : end], device=device)
        hidden_TD: Tensor = self.model(tokens_T, positions_T, cache.at(self.done), self.dispatch)[0]
        return hidden_TD


def route_margin(choice_TE: Tensor, config: ModelConfig) -> Tensor:
    """By how much the chosen experts lead, [T] (or more axes): the least of the leads of groups and of experts."""
    margin_T = torch.full_like(choice_TE[..., 0], torch.inf)
    if is_group_limited(config):
        choice_TGX = choice_TE.reshape(*choice_TE.shape[:-1], config.n_group, -1)
        groups_TG = group_scores(choice_TGX, config)
        margin_T = _lead(groups_TG, config.topk_group)
        worst_T1 = groups_TG.topk(config.topk_group, dim=-1).values[..., -1:]
        choice_TE = choice_TGX.masked_fill((groups_TG < worst_T1)[..., None], -torch.inf).flatten(-2)
    return torch.minimum(margin_T, _lead(choice_TE, config.num_experts_per_tok))


def _lead(x: Tensor, count: int) -> Tensor:
    """The least of the `count` largest values minus the largest of the others."""
    if count == x.shape[-1]:
        return torch.full_like(x[..., 0], torch.inf)
    top = x.topk(count + 1, dim=-1).values
    return top[..., count - 1] - top[..., count]
