"""A gated feed-forward and its way back, some tokens at a time, and its plain twin.

Letters: T tokens, t of them at once, D hidden size, F width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

AT_ONCE = 1 << 19  # numbers of the hidden layer: what is computed from them stays in cache


def swiglu(x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate x) * up x) for float32 that is trained: [T, D].

    Kept are the products with gate and up alone; all else of the hidden layer never stands for all tokens.
    """
    y_TD: Tensor = _apply(x_TD, gate_FD, up_FD, down_DF)
    return y_TD


def plain(x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """The definition."""
    return F.linear(F.silu(F.linear(x_TD, gate_FD)) * F.linear(x_TD, up_FD), down_DF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        y_TD = torch.empty_like(x_TD)
        gate_TF, up_TF = (x_TD.new_empty(x_TD.shape[0], gate_FD.shape[0]) for _ in range(2))
        for x_tD, gate_tF, up_tF, y_tD in _some(gate_FD.shape[0], x_TD, gate_TF, up_TF, y_TD):
            torch.mm(x_tD, gate_FD.mT, out=gate_tF)
            torch.mm(x_tD, up_FD.mT, out=up_tF)
            torch.mm(F.silu(gate_tF).mul_(up_tF), down_DF.mT, out=y_tD)
        ctx.save_for_backward(x_TD, gate_TF, up_TF, gate_FD, up_FD, down_DF)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x_TD, gate_TF, up_TF, gate_FD, up_FD, down_DF = ctx.saved_tensors
        dx_TD = torch.empty_like(x_TD)
        dgate_FD, dup_FD, ddown_DF = (torch.zeros_like(matrix) for matrix in (gate_FD, up_FD, down_DF))
        for dy_tD, x_tD, gate_tF, up_tF, dx_tD in _some(gate_FD.shape[0], grads[0], x_TD, gate_TF, up_TF, dx_TD):
            silu_tF, da_tF = F.silu(gate_tF), dy_tD @ down_DF
            ddown_DF.addmm_(dy_tD.mT, silu_tF * up_tF)
            dup_tF = silu_tF.mul_(da_tF)
            dgate_tF = torch.ops.aten.silu_backward(da_tF.mul_(up_tF), gate_tF)
            torch.mm(dgate_tF, gate_FD, out=dx_tD).addmm_(dup_tF, up_FD)
            dgate_FD.addmm_(dgate_tF.mT, x_tD)
            dup_FD.addmm_(dup_tF.mT, x_tD)
        return dx_TD, dgate_FD, dup_FD, ddown_DF


def _some(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """These rows of all tensors, then those."""
    return zip(*(tensor.split(max(AT_ONCE // width, 1)) for tensor in tensors), strict=True)


_apply: Callable[..., Tensor] = _SwiGLU.apply
