"""The next token of one sequence: filters, allowed tokens, the draw, and the verdict on a draft.

Letters: T positions of a step, V vocabulary.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from cavelight.run.sample import Sampling, distribution, draw, scores
from cavelight.run.speculate import Draft, judge

# Which tokens may follow prompt and output so far: [V], true where one may; None for all. It has to depend on its
# argument alone: it is asked about drafts too, and about the same tokens more than once.
Allowed = Callable[[Sequence[int]], Tensor | None]


class Chooser:
    """Chooses for one sequence. The source of chance is the sequence's own, so that company changes nothing."""

    def __init__(self, sampling: Sampling, allowed: Allowed | None = None) -> None:
        self.sampling, self.allowed, self.source = sampling, allowed, sampling.generator()

    def scores(self, logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        """What greedy choice takes the largest of: [V], float64."""
        return scores(logits_V, tokens, self.sampling, self.allowed(tokens) if self.allowed else None)

    def distribution(self, logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        """What other choice draws from: [V], float64."""
        return distribution(logits_V, tokens, self.sampling, self.allowed(tokens) if self.allowed else None)

    def guess(self, logits_V: Tensor, tokens: Sequence[int]) -> Draft:
        """By a module's logits, what follows `tokens`."""
        if self.sampling.greedy:
            return Draft(int(self.scores(logits_V, tokens).argmax()))
        probs_V = self.distribution(logits_V, tokens)
        return Draft(draw(probs_V, self.source), probs_V)

    def tokens(self, logits_TV: Tensor, tokens: Sequence[int], drafts: Sequence[Draft]) -> list[int]:
        """By the trunk's logits, what is certain to follow `tokens`: the drafts that stand, and one token more."""
        new: list[int] = []
        for row, logits_V in enumerate(logits_TV):
            draft = drafts[row] if row < len(drafts) else None
            new.append(self._token(logits_V, [*tokens, *new], draft))
            if draft is None or new[-1] != draft.token:
                break
        return new

    def _token(self, logits_V: Tensor, tokens: Sequence[int], draft: Draft | None) -> int:
        if self.sampling.greedy:
            return int(self.scores(logits_V, tokens).argmax())
        p_V = self.distribution(logits_V, tokens)
        return draw(p_V, self.source) if draft is None else judge(draft, p_V, self.source)
