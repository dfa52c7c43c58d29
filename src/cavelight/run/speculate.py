"""Speculation with the MTP modules: draft some tokens, let the trunk judge all of them in one step, keep what holds.

Letters: T tokens, D hidden size, V vocabulary. t_i is the token at position i, h^0_i the trunk's hidden state there,
h^k_i that of MTP module k (from 1): made of h^(k-1)_i and t_(i+k), it predicts t_(i+k+1) (V3 report, eq. 21-23).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.model.ports import Dispatch
from cavelight.model.transformer import Transformer
from cavelight.run.cache import LatentCache
from cavelight.run.sample import draw
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import Parameter, parameters


@dataclass(frozen=True)
class Draft:
    """A guessed token and the distribution it was drawn from; None where it was simply the likeliest."""

    token: int
    probs_V: Tensor | None = None


Pick = Callable[[Tensor, Sequence[int]], Draft]  # (logits_V, all tokens before) -> a token


class Drafter:
    """The MTP chain, kept in step with the trunk.

    While the trunk has seen positions below n and t_n is known, module k is true below n - k + 1: it needs t_(i+k).
    It goes on a few positions with drafts in place of tokens, and does those again once the tokens are known. For
    that one state of each module but the last is kept, the one that the next module continues from.
    """

    def __init__(self, model: Transformer, cache: LatentCache, dispatch: Dispatch, depth: int) -> None:
        self.model, self.cache, self.dispatch = model, cache, dispatch
        self.depth = depth  # how many modules are in use
        self.seen = 0  # n at the last proposal
        self.unseen: list[Tensor] = []  # the trunk's states since, from position n on
        self.edge: list[Tensor] = []  # of module k (k = 1, 2, ...), its state at position n - k

    def see(self, hidden_TD: Tensor) -> None:
        """Take the trunk's raw hidden states at the next positions."""
        self.unseen.append(hidden_TD)

    def propose(self, tokens: Sequence[int], drafts: int, pick: Pick) -> list[Draft]:
        """Guess the tokens that follow `tokens`: all tokens known, at least one more than states were seen.

        Module k makes draft k; the last one makes all further drafts too, each time on its own state as if that
        came from the module before, one position on. The paper does not do this: it is as good as it turns out.
        """
        hidden_TD = torch.cat(self.unseen)
        start, end = self.seen, self.seen + hidden_TD.shape[0]
        line, proposed, edge = list(tokens), [], []
        for k in range(1, self.depth + 1):
            first = max(0, start - k + 1)
            if k > 1 and start - k + 1 >= 0:
                hidden_TD = torch.cat([self.edge[k - 2], hidden_TD])
            hidden_TD = self._module(k, hidden_TD, line[first + k : end + k], first, after=k - 1)
            edge += [hidden_TD[end - k - first, None]] if end >= k else []
            if len(line) == end + k:
                proposed.append(pick(self.model.draft_head(k - 1, hidden_TD[-1:])[0], line))
                line.append(proposed[-1].token)
        self.seen, self.unseen, self.edge = end, [], edge
        for ahead in range(drafts - self.depth):
            position, hidden_TD = end + ahead, hidden_TD[-1:]
            hidden_TD = self._module(self.depth, hidden_TD, line[position + self.depth :], position, after=self.depth)
            proposed.append(pick(self.model.draft_head(self.depth - 1, hidden_TD)[0], line))
            line.append(proposed[-1].token)
        return proposed[:drafts]

    def _module(self, k: int, hidden_TD: Tensor, tokens: Sequence[int], first: int, after: int) -> Tensor:
        """h^k at `first` and after; `after`: the number of the module that made `hidden_TD`, 0 for the trunk."""
        device = hidden_TD.device
        positions_T = torch.arange(first, first + len(tokens), device=device)
        tokens_T = torch.tensor(tokens, device=device)
        attend = self.cache.at(first)
        made_TD, _ = self.model.draft(k - 1, hidden_TD, tokens_T, positions_T, attend, self.dispatch, after=after - 1)
        return made_TD


def judge(draft: Draft, p_V: Tensor, source: torch.Generator) -> int:
    """The draft's token if it stands, else another: either way distributed exactly as `p_V` (rejection sampling).

    A token drawn from q stands with probability min(1, p/q); what is missing to p is drawn from max(p - q, 0), made
    to sum to one (Leviathan et al., arXiv 2211.17192, section 2.3).
    """
    q_V = draft.probs_V
    assert q_V is not None
    chance = torch.rand((), dtype=torch.float64, generator=source)
    if chance * q_V[draft.token] < p_V[draft.token]:
        return draft.token
    missing_V = (p_V - q_V).clamp(min=0)
    return draw(missing_V if missing_V.any() else p_V, source)  # nothing missing: p and q differ by rounding alone


def cost_of_round(config: ModelConfig, drafts: int) -> float:
    """What a round with so many drafts costs, in plain steps, where reading the weights is what takes the time.

    Of a layer's experts T tokens read 1 - (1 - K/E)^T, if they choose independently; all else is read once a pass,
    and the head by every draft. Depends on sizes alone, never on a clock.
    """
    depth = min(drafts, config.num_nextn_predict_layers)
    table = [p for p in parameters(config) if p.role != "embedding"]
    trunk = [p for p in table if not p.name.startswith("mtp.")]
    head = [p for p in trunk if p.role == "head"]
    modules = [[p for p in table if p.name.startswith(f"mtp.{m}.")] + head for m in range(depth)]

    def read(part: list[Parameter], tokens: int) -> float:
        return sum(p.size * (_share_met(config, tokens) if p.role == "expert" else 1) for p in part)

    drafting = sum(read(module, drafts + 1) for module in modules)
    if drafts > depth:
        drafting += (drafts - depth) * read(modules[-1], 1)
    return (read(trunk, drafts + 1) + drafting) / read(trunk, 1)


def _share_met(config: ModelConfig, tokens: int) -> float:
    """The expected share of a layer's experts that at least one of the tokens goes to."""
    return 1 - (1 - config.num_experts_per_tok / (config.n_routed_experts or 1)) ** tokens
