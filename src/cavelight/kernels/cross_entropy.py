"""Cross-entropy of logits with the gradient made along with the value, and its plain twin.

Letters: T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fused(logits_TV: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
    """Sum of -log softmax(logits)[label] over the labelled tokens, float32 scalar.

    The softmax that the value needs becomes the gradient in place: two passes over T * V numbers less.
    """
    loss: Tensor = _apply(logits_TV, labels_T, ignore)
    return loss


def plain(logits_TV: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
    """The definition."""
    return F.cross_entropy(logits_TV, labels_T, ignore_index=ignore, reduction="sum")


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
        kept_T, index_T1 = labels_T != ignore, labels_T.clamp(min=0)[:, None]
        error_TV = logits_TV.softmax(dim=-1)
        logsumexp_T = logits_TV.amax(dim=-1) - error_TV.amax(dim=-1).log()  # at the largest: no second round of exp
        nll_T = logsumexp_T - logits_TV.gather(1, index_T1)[:, 0]
        if ctx.needs_input_grad[0]:  # d loss / d logits is the softmax, minus one at the label
            error_TV.scatter_add_(1, index_T1, error_TV.new_full(index_T1.shape, -1.0))
            ctx.save_for_backward(error_TV, kept_T)
        return (nll_T * kept_T).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        error_TV, kept_T = ctx.saved_tensors
        return error_TV * (kept_T * grads[0])[:, None], None, None


_apply: Callable[..., Tensor] = _Fused.apply
