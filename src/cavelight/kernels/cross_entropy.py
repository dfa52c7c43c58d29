"""The head and the cross-entropy after it as one operation that never holds all logits, and its plain twin.

Letters: T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 1 << 22  # 16 MB in float32: little to hold, and enough rows for a matrix product
FEWEST_TOKENS = 64


def linear(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
    """Sum of -log softmax(weight hidden_t)[label_t] over the tokens whose label is not `ignore`: float32 scalar, nats.

    A few tokens at a time: their softmax becomes the gradient in place, which goes into those of hidden states and
    weight at once. So the backward pass has nothing left to do but scale them.
    """
    loss: Tensor = _apply(hidden_TD, weight_VD, labels_T, ignore)
    return loss


def plain(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
    """The definition."""
    logits_TV = F.linear(hidden_TD, weight_VD).float()
    return F.cross_entropy(logits_TV, labels_T, ignore_index=ignore, reduction="sum")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
        at_once = max(LOGITS_AT_ONCE // weight_VD.shape[0], FEWEST_TOKENS)
        wanted = any(ctx.needs_input_grad)
        dhidden_TD = torch.empty_like(hidden_TD)
        # Sums over many chunks stay in float32, whatever the weight is stored in.
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        nll = hidden_TD.new_zeros((), dtype=torch.float32)
        logits_TV = hidden_TD.new_empty(min(at_once, hidden_TD.shape[0]), weight_VD.shape[0])
        parts = (hidden_TD.split(at_once), labels_T.split(at_once), dhidden_TD.split(at_once))
        for hidden_tD, labels_t, dhidden_tD in zip(*parts, strict=True):
            torch.mm(hidden_tD, weight_VD.mT, out=logits_TV[: hidden_tD.shape[0]])
            nll_t, error_tV = _error(logits_TV[: hidden_tD.shape[0]].float(), labels_t, ignore)
            nll += nll_t.sum()
            if wanted:
                error_tV = error_tV.to(weight_VD.dtype)
                torch.mm(error_tV, weight_VD, out=dhidden_tD)
                _add_product(dweight_VD, error_tV.mT, hidden_tD)
        if wanted:
            ctx.save_for_backward(dhidden_TD, dweight_VD.to(weight_VD.dtype))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD * grads[0], dweight_VD * grads[0], None, None


def _error(logits_tV: Tensor, labels_t: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Each token's -log p, and what its logits become: their gradient, which is the softmax, minus one at the label.

    Zero where a label is ignored.
    """
    kept_t1, index_t1 = (labels_t != ignore)[:, None], labels_t.clamp(min=0)[:, None]
    most_t1, own_t1 = logits_tV.amax(dim=-1, keepdim=True), logits_tV.gather(1, index_t1)
    p_tV = torch.softmax(logits_tV, dim=-1, out=logits_tV)
    nll_t1 = (most_t1 - p_tV.amax(dim=-1, keepdim=True).log() - own_t1) * kept_t1
    error_tV = p_tV.scatter_add_(1, index_t1, p_tV.new_full(index_t1.shape, -1.0))
    return nll_t1[:, 0], error_tV if kept_t1.all() else error_tV.mul_(kept_t1)


def _add_product(sum_XY: Tensor, a_XT: Tensor, b_TY: Tensor) -> None:
    if a_XT.dtype == sum_XY.dtype:
        sum_XY.addmm_(a_XT, b_TY)
    else:
        sum_XY += a_XT @ b_TY


_apply: Callable[..., Tensor] = _Linear.apply
