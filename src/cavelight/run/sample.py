"""From logits to a token: filters, the distribution they leave, and a draw from it.

Letters: V vocabulary. All of it happens on the CPU in float64, so that a seed means the same on every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from cavelight.errors import UserError, check_options


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy; each filter is off at its default.

    temperature: 0 takes the likeliest token, of equal ones the lowest id. top_k: keep the k likeliest and what ties
    with the k-th; 0 keeps all. top_p: keep the fewest likeliest tokens that together reach this probability. min_p:
    keep tokens at least so likely, relative to the likeliest. repetition_penalty: above 1 makes tokens of prompt and
    output less likely (CTRL, arXiv 1909.05858). seed: None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("temperature", _is_number(self.temperature) and 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", _is_whole(self.top_k) and self.top_k >= 0, "0 (off) or more"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            (
                "repetition_penalty",
                _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
                "above 0; 1 is off",
            ),
            ("seed", self.seed is None or (_is_whole(self.seed) and 0 <= self.seed < 2**63), "from 0 to 2^63 - 1"),
        )
        check_options("The sampling options cannot be used", self, rules)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral)


def scores(logits_V: Tensor, history: Sequence[int], sampling: Sampling, allowed_V: Tensor | None = None) -> Tensor:
    """Logits after the repetition penalty, [V] in float64 on the CPU; minus infinity where `allowed_V` is false.

    Tokens in `history` (the whole prompt and output so far) have positive logits divided by the penalty and negative
    ones multiplied, once however often they occur. Raises UserError if the model produced NaN or infinity.
    """
    scores_V = logits_V.to("cpu", torch.float64)
    if not math.isfinite(scores_V.sum()):  # float32 values cannot overflow this sum
        raise UserError(
            "The model produced NaN or infinite logits",
            why="its weights hold NaN or overflow in this type",
            do="check the checkpoint; if its weights are finite, run it in float32 or bfloat16",
        )
    if sampling.repetition_penalty != 1 and history:
        seen = torch.tensor(sorted(set(history)))
        old = scores_V[seen]
        penalty = sampling.repetition_penalty
        scores_V = scores_V.scatter(0, seen, torch.where(old > 0, old / penalty, old * penalty))
    if allowed_V is not None:
        if not allowed_V.any():
            raise UserError("No token is allowed to follow", why="the mask of allowed tokens rules all of them out")
        scores_V = scores_V.masked_fill(~allowed_V.to("cpu"), -math.inf)
    return scores_V


def distribution(
    logits_V: Tensor, history: Sequence[int], sampling: Sampling, allowed_V: Tensor | None = None
) -> Tensor:
    """The probabilities [V] (float64) that the next token is drawn from; at temperature 0 all on one token.

    In this order, each on what the one before left, as transformers does: repetition penalty, allowed tokens,
    temperature, top-k, top-p, min-p.
    """
    scores_V = scores(logits_V, history, sampling, allowed_V)
    if sampling.greedy:
        return torch.zeros_like(scores_V).index_fill_(0, scores_V.argmax(), 1.0)
    scores_V = (scores_V - scores_V.max()) / sampling.temperature  # the likeliest is at 0 from here on
    out = -math.inf
    if 0 < sampling.top_k < len(scores_V):
        kth = scores_V.topk(sampling.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < kth, out)
    if sampling.top_p < 1:
        sorted_V, ids_V = scores_V.sort(descending=True, stable=True)  # of scores: probabilities may round to the same
        sorted_V = sorted_V.softmax(dim=0)
        before_V = sorted_V.cumsum(dim=0) - sorted_V
        scores_V = scores_V.index_fill(0, ids_V[before_V >= sampling.top_p], out)
    if sampling.min_p > 0:
        scores_V = scores_V.masked_fill(scores_V < math.log(sampling.min_p), out)
    return scores_V.softmax(dim=0)


def draw(probs_V: Tensor, seed: int, position: int) -> int:
    """A token with these probabilities, which need not sum to one: the same for equal seeds, positions and tensors.

    The largest of p / e, e from an exponential distribution, is the first of V clocks to ring (Gumbel-max). The noise
    is that of the position: a draft that is drawn from a module's guess at these probabilities with it comes out as
    the same token whenever the guess is close, and no draft, budget or company can change what the trunk then draws
    (Daliri et al., arXiv 2408.07978).
    """
    source = np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, 0, position)))
    return int((probs_V / torch.from_numpy(source.standard_exponential(len(probs_V)))).argmax())
