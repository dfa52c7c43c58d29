"""Speculation with the MTP modules: draft some tokens, let the trunk judge all of them in one step, keep what holds.

Letters: T tokens, D hidden size, V vocabulary. t_i is the token at position i, h^0_i the trunk's hidden state there,
h^k_i that of MTP module k (from 1): made of h^(k-1)_i and t_(i+k), it predicts t_(i+k+1) (V3 report, eq. 21-23).
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cavelight.model.ports import Attend, Dispatch
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import Parameter, parameters

Pick = Callable[[Tensor, Sequence[int]], int | None]  # (logits_V, all tokens before) -> a token, None for no guess


@dataclass
class Chain:
    """Where the MTP modules stand in one sequence.

    While the trunk has seen positions below n and t_n is known, module k is true below n - k + 1: it needs t_(i+k).
    It goes on a few positions with drafts in place of tokens, and does those again once the tokens are known. For
    that one state of each module but the last is kept, the one that the next module continues from.
    """

    home: Any = None  # whatever tells `AttendAt` which sequence this is
    base: int = 0  # rows of all modules before it are in the cache, from elsewhere
    seen: int = 0  # n at the last proposal
    unseen: list[Tensor] = field(default_factory=list)  # the trunk's raw states since, from position n on
    edge: list[Tensor] = field(default_factory=list)  # of module k (k = 1, 2, ...), its state [1, D] at n - k
    tail: list[Tensor] = field(default_factory=list)  # the trunk's last states, if others are to begin where it is


@dataclass(frozen=True)
class Wish:
    """So many drafts of what follows `tokens`: all tokens known, at least one more than the trunk has seen.

    Fewer where `pick` has no guess, or after a guess that is one of `stop_ids`.
    """

    chain: Chain
    tokens: Sequence[int]
    drafts: int
    pick: Pick
    stop_ids: AbstractSet[int] = frozenset()


# (chain, first position, position after the last one) of every sequence in a step -> its Attend
AttendAt = Callable[[Sequence[tuple[Chain, int, int]]], Attend]


class Drafter:
    """The chain of `depth` MTP modules, kept in step with the trunk in any number of sequences at once."""

    def __init__(self, model: Transformer, attend_at: AttendAt, dispatch: Dispatch, depth: int) -> None:
        self.model, self.attend_at, self.dispatch, self.depth = model, attend_at, dispatch, depth

    def propose(self, wishes: Sequence[Wish]) -> list[list[int]]:
        """Bring the modules up to what is known, and guess what follows: for each wish at most so many drafts.

        Module k makes draft k; the last one makes all further drafts too, each time on its own state as if that
        came from the module before, one position on. The paper does not do this: it is as good as it turns out.
        """
        lines = [_Line(wish) for wish in wishes]
        for k in range(1, self.depth + 1):
            for line in lines:
                line.aim(k)
            self._module(k, lines, after=k - 1)
            for line in lines:
                line.keep_edge(k)
            self._guess(k, [line for line in lines if len(line.tokens) == line.end + k])
        for line in lines:
            line.leave()
        ahead = [line for line in lines if line.wants_more]
        while ahead:
            for line in ahead:
                line.go_on(self.depth)
            self._module(self.depth, ahead, after=self.depth)
            self._guess(self.depth, ahead)
            ahead = [line for line in ahead if line.wants_more]
        return [line.drafts for line in lines]

    def _module(self, k: int, lines: Sequence["_Line"], after: int) -> None:
        """h^k where each line aims, in place of the states of the module before, number `after`."""
        hidden_TD = torch.cat([line.states_TD for line in lines])
        tokens = [line.tokens[line.first + k : line.stop + k] for line in lines]
        if not len(hidden_TD):
            return
        positions_T = torch.cat([torch.arange(line.first, line.stop) for line in lines]).to(hidden_TD.device)
        tokens_T = torch.tensor([token for some in tokens for token in some], device=hidden_TD.device)
        attend = self.attend_at([(line.wish.chain, line.first, line.stop) for line in lines if line.first < line.stop])
        made_TD, _ = self.model.draft(k - 1, hidden_TD, tokens_T, positions_T, attend, self.dispatch, after=after - 1)
        for line, states_TD in zip(lines, made_TD.split([len(some) for some in tokens]), strict=True):
            line.states_TD = states_TD

    def _guess(self, k: int, lines: Sequence["_Line"]) -> None:
        """A draft from the last state of each line that wants one more."""
        lines = [line for line in lines if line.wants_more]
        if lines:
            logits_WV = self.model.draft_head(k - 1, torch.cat([line.states_TD[-1:] for line in lines]))
            for line, logits_V in zip(lines, logits_WV, strict=True):
                line.add(line.wish.pick(logits_V, line.tokens))


class _Line:
    """One sequence within a proposal: its tokens and drafts, and the states of the module in turn from `first` on."""

    def __init__(self, wish: Wish) -> None:
        chain = wish.chain
        self.wish, self.tokens, self.drafts = wish, list(wish.tokens), list[int]()
        self.ended = False
        self.states_TD = torch.cat(chain.unseen)
        self.start, self.end = chain.seen, chain.seen + self.states_TD.shape[0]
        self.first = self.stop = self.start
        self.edge: list[Tensor] = []

    @property
    def wants_more(self) -> bool:
        return len(self.drafts) < self.wish.drafts and not self.ended

    def aim(self, k: int) -> None:
        """Module k's positions: those that changed for it, as far as tokens are known."""
        chain, self.first = self.wish.chain, self.start - k + 1
        if k > 1 and self.first >= chain.base:
            self.states_TD = torch.cat([chain.edge[k - 2], self.states_TD])
        self.first = max(chain.base, self.first)
        self.stop = max(self.first, min(self.end, len(self.tokens) - k))
        self.states_TD = self.states_TD[: self.stop - self.first]

    def keep_edge(self, k: int) -> None:
        if self.end - k >= self.wish.chain.base:
            self.edge.append(self.states_TD[self.end - k - self.first, None])

    def leave(self) -> None:
        """The chain has come to the end of what is known."""
        chain = self.wish.chain
        chain.seen, chain.unseen, chain.edge = self.end, [], self.edge

    def go_on(self, depth: int) -> None:
        """One position further, on the module's own last state."""
        self.states_TD = self.states_TD[-1:]
        self.first = len(self.tokens) - 1 - depth
        self.stop = self.first + 1

    def add(self, draft: int | None) -> None:
        self.ended = draft is None or draft in self.wish.stop_ids
        if draft is not None:
            self.drafts.append(draft)
            self.tokens.append(draft)


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
