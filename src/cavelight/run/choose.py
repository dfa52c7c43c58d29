"""The next token of one sequence: filters, allowed tokens, the draw, and which drafts stand.

Letters: T positions of a step, V vocabulary.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from secrets import randbits

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.run.sample import Sampling, distribution, draw, scores

# Which tokens may follow prompt and output so far: [V] booleans, true where one may; None for all. It has to depend on
# its argument alone: it is asked about drafts too, and about the same tokens more than once.
Allowed = Callable[[Sequence[int]], Tensor | None]
Doubt = Callable[[int, Tensor], bool]  # (row, its scores_V) -> whether rounding might decide


class Chooser:
    """Chooses for one sequence. A choice hangs on logits, tokens and the seed alone: drafts do not change the output.

    So a draft stands if it is what the trunk chooses, for sampling as for greedy choice.
    """

    def __init__(
        self, sampling: Sampling, allowed: Allowed | None = None, stop_ids: AbstractSet[int] = frozenset()
    ) -> None:
        self.sampling, self.allowed, self.stop_ids = sampling, allowed, stop_ids
        self.seed = randbits(63) if sampling.seed is None else sampling.seed

    def guess(self, logits_V: Tensor, tokens: Sequence[int]) -> int | None:
        """By a module's logits, what follows `tokens`; None where the mask says that nothing can.

        Tokens that are drafts may lead where the trunk never goes, and where the mask has no answer.
        """
        try:
            allowed_V = self._mask(tokens, len(logits_V))
            dead_end = allowed_V is not None and not allowed_V.any()
        except Exception:  # the user's hook may raise anything; if the trunk comes here, it is asked again and heard
            return None
        return None if dead_end else self._token(logits_V, tokens, allowed_V)

    def tokens(
        self, logits_TV: Tensor, tokens: Sequence[int], drafts: Sequence[int], doubt: Doubt | None = None
    ) -> tuple[list[int], bool]:
        """By the trunk's logits, what is certain to follow `tokens`: the drafts that stand, and one token more.

        Nothing follows an end token. Ends before a row that `doubt` is true of; the second value says whether it did.
        An error, the hook's too, is raised if it comes first; later ones come first in the next step.
        """
        new: list[int] = []
        for row, logits_V in enumerate(logits_TV):
            line = [*tokens, *new]
            try:
                allowed_V = self._mask(line, len(logits_V))
                if doubt and doubt(row, scores(logits_V, line, self.sampling, allowed_V)):
                    return new, True
                new.append(self._token(logits_V, line, allowed_V))
            except Exception:  # the hook's again
                if not new:
                    raise
                break
            if row >= len(drafts) or new[-1] != drafts[row] or new[-1] in self.stop_ids:
                break
        return new, False

    def _mask(self, tokens: Sequence[int], V: int) -> Tensor | None:
        mask_V = self.allowed(list(tokens)) if self.allowed else None  # its own list, to do with as it likes
        fits = isinstance(mask_V, Tensor) and mask_V.dtype == torch.bool and mask_V.shape == (V,)
        if mask_V is not None and not fits:
            raise UserError(
                "The mask of allowed tokens cannot be used",
                got=" ".join(repr(mask_V).split())[:100],
                why=f"it has to be a tensor of {V} booleans, one for each token of the vocabulary",
            )
        return mask_V

    def _token(self, logits_V: Tensor, tokens: Sequence[int], allowed_V: Tensor | None) -> int:
        if self.sampling.greedy:
            return int(scores(logits_V, tokens, self.sampling, allowed_V).argmax())
        return draw(distribution(logits_V, tokens, self.sampling, allowed_V), self.seed, len(tokens))
