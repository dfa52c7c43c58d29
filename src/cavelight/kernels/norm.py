"""Root-mean-square norm with a gain, and its plain twin.

Letters: T tokens (or any rows), D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight, the statistics in float32.

    Where float32 is trained it keeps nothing but its input and a number a row, and its way back is half as long.
    """
    if x_TD.dtype == weight_D.dtype == torch.float32 and torch.is_grad_enabled():
        y_TD: Tensor = _apply(x_TD, weight_D, eps)
        return y_TD
    return plain(x_TD, weight_D, eps)


def plain(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition."""
    return F.rms_norm(x_TD.float(), weight_D.shape, eps=eps).to(x_TD.dtype) * weight_D


class _RMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        rstd_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, rstd_T1)
        y_TD: Tensor = x_TD * rstd_T1
        return y_TD.mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, rstd_T1 = ctx.saved_tensors
        dy_x_TD = (grads[0] * x_TD).flatten(0, -2)
        dweight_D = torch.mv(dy_x_TD.mT, rstd_T1.flatten())
        # dx = rstd (w dy - x rstd^2 mean(x w dy))
        pull_T1 = torch.mv(dy_x_TD, weight_D).view_as(rstd_T1).div_(-x_TD.shape[-1]).mul_(rstd_T1**3)
        dx_TD = (grads[0] * weight_D).mul_(rstd_T1).addcmul_(x_TD, pull_T1)
        return dx_TD, dweight_D, None


_apply: Callable[..., Tensor] = _RMS.apply
