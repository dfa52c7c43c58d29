"""Root-mean-square norm with a gain, and its plain twin.

Letters: T tokens (or any rows), D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight, the statistics in float32.

    Where float32 is trained it keeps nothing but its input and a number a row, and its way back is half as long.
    """
    if x_TD.dtype == weight_D.dtype == torch.float32 and torch.is_grad_enabled():
        y_TD: Tensor = _apply(x_TD, weight_D, eps)
        _outputs[y_TD.data_ptr()] = y_TD
        return y_TD
    return plain(x_TD, weight_D, eps)


def plain(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition."""
    return F.rms_norm(x_TD.float(), weight_D.shape, eps=eps).to(x_TD.dtype) * weight_D


@contextmanager
def outputs_remade() -> Iterator[None]:
    """What is computed within keeps no output of `rms` for its way back, which remakes it at the first need.

    The input is kept in any case, and two passes over it are nothing beside the products that want the output.
    """
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: Tensor) -> Any:
    """The node of the graph that made an output, which knows how; any other tensor itself.

    Hooks are handed a detached alias: the output is found by its address, while it is still in somebody's hands.
    """
    output = _outputs.get(tensor.data_ptr())
    same = output is not None and (output.shape, output.stride()) == (tensor.shape, tensor.stride())
    return output.grad_fn if output is not None and same and type(output.grad_fn) is _Node else tensor


def _unpack(kept: Any) -> Tensor:
    if type(kept) is _Node and kept.output is None:
        x_TD, weight_D, rstd_T1 = kept.saved_tensors
        kept.output = _scaled(x_TD, rstd_T1, weight_D)
    tensor: Tensor = kept.output if type(kept) is _Node else kept
    return tensor


def _scaled(x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor) -> Tensor:
    y_TD: Tensor = x_TD * rstd_T1
    return y_TD.mul_(weight_D)


class _RMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        rstd_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, rstd_T1)
        ctx.output = None  # what `_unpack` has made, until nobody wants it any more
        return _scaled(x_TD, rstd_T1, weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, rstd_T1 = ctx.saved_tensors
        ctx.output = None
        dy_x_TD = (grads[0] * x_TD).flatten(0, -2)
        dweight_D = torch.mv(dy_x_TD.mT, rstd_T1.flatten())
        # dx = rstd (w dy - x rstd^2 mean(x w dy))
        pull_T1 = torch.mv(dy_x_TD, weight_D).view_as(rstd_T1).div_(-x_TD.shape[-1]).mul_(rstd_T1**3)
        dx_TD = (grads[0] * weight_D).mul_(rstd_T1).addcmul_(x_TD, pull_T1)
        return dx_TD, dweight_D, None


_apply: Callable[..., Tensor] = _RMS.apply
_Node: Any = _RMS._backward_cls
_outputs: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # those that are in use, by their address
