"""The routed experts of one layer: every token through its chosen ones, weighted and summed, and a plain twin.

Letters: T tokens, K experts a token, E experts, D hidden size, F expert width, P = T * K pairs of token and expert,
R rows: the pairs sorted by expert (each expert's rows padded to a multiple, where that pays).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_MATRIX = 1 << 16  # elements of one expert's matrix that are quicker copied than sorted for
FEW_PAIRS = 32


def grouped(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """y_t = sum_k w_tk down(silu(gate x_t) * up x_t) over the chosen experts (V3 report, eq. 12): [T, D].

    One matrix product an expert and matrix, on rows that lie together; idle experts cost nothing. A few tokens of small
    experts rather take copies of the matrices they need: that is less work than sorting.
    """
    matrix = gate_EFD.shape[1] * gate_EFD.shape[2]
    if not torch.is_grad_enabled() and matrix <= SMALL_MATRIX and ids_TK.numel() <= FEW_PAIRS:
        return _gathered(x_TD, ids_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
    y_TD: Tensor = _apply(x_TD, ids_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
    return y_TD


def _gathered(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    (T, K), ids_P = ids_TK.shape, ids_TK.flatten()
    x_PD1 = x_TD.repeat_interleave(K, dim=0)[..., None]
    a_PF1 = F.silu(gate_EFD[ids_P] @ x_PD1) * (up_EFD[ids_P] @ x_PD1)
    y_TKD = (down_EDF[ids_P] @ a_PF1).view(T, K, -1)
    return (weights_TK[:, None].to(y_TKD.dtype) @ y_TKD)[:, 0]


def plain(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The definition, one token and expert at a time: [T, D]."""
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        outputs = [down_EDF[e] @ (F.silu(gate_EFD[e] @ x_D) * (up_EFD[e] @ x_D)) for e in ids_K]
        rows.append(sum(w * y_D.float() for w, y_D in zip(weights_K, outputs, strict=True)))
    return torch.stack(rows).to(x_TD.dtype)


class _Grouped(torch.autograd.Function):
    """Forward and backward by hand, so that products are written in place and nothing is kept twice."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *matrices: Tensor) -> Tensor:
        gate_EFD, up_EFD, down_EDF = matrices
        (T, K), D, width = ids_TK.shape, x_TD.shape[1], gate_EFD.shape[1]
        slots_P, pairs_R, sizes = _sort(ids_TK, gate_EFD.shape[0], _row_multiple(x_TD))
        x_RD = x_TD.index_select(0, pairs_R // K)
        gate_RF, up_RF = x_RD.new_empty(x_RD.shape[0], width), x_RD.new_empty(x_RD.shape[0], width)
        _multiply(x_RD, gate_EFD.mT, gate_RF, sizes)
        _multiply(x_RD, up_EFD.mT, up_RF, sizes)
        a_RF = F.silu(gate_RF).mul_(up_RF)
        y_RD = torch.empty_like(x_RD)
        _multiply(a_RF, down_EDF.mT, y_RD, sizes)
        y_TKD = y_RD.index_select(0, slots_P).view(T, K, D)
        ctx.save_for_backward(x_RD, gate_RF, up_RF, y_TKD, weights_TK, slots_P, pairs_R, *matrices)
        ctx.sizes = sizes
        return torch.bmm(weights_TK[:, None].to(y_TKD.dtype), y_TKD)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,), sizes = grads, ctx.sizes
        x_RD, gate_RF, up_RF, y_TKD, weights_TK, slots_P, pairs_R, gate_EFD, up_EFD, down_EDF = ctx.saved_tensors
        T, K = weights_TK.shape
        dweights_TK = torch.bmm(y_TKD, dy_TD[..., None])[..., 0].to(weights_TK.dtype)
        # A padding row stands for pair 0 as well; its weight of zero keeps it out of every gradient.
        weights_R = torch.zeros_like(pairs_R, dtype=dy_TD.dtype)
        weights_R[slots_P] = weights_TK.flatten().to(dy_TD.dtype)
        dy_RD = dy_TD.index_select(0, pairs_R // K).mul_(weights_R[:, None])
        sigmoid_RF = gate_RF.sigmoid()
        silu_RF = gate_RF * sigmoid_RF
        da_RF = torch.empty_like(gate_RF)
        _multiply(dy_RD, down_EDF, da_RF, sizes)
        ddown_EDF = _multiply_rows(dy_RD, silu_RF * up_RF, sizes)
        dup_RF = da_RF * silu_RF
        dgate_RF = da_RF.mul_(up_RF).mul_(silu_RF.mul_(1 - sigmoid_RF).add_(sigmoid_RF))  # silu' = silu (1 - s) + s
        dx_RD = torch.empty_like(x_RD)
        _multiply(dgate_RF, gate_EFD, dx_RD, sizes)
        _multiply(dup_RF, up_EFD, dx_RD, sizes, add=True)
        dx_TD = dx_RD.index_select(0, slots_P).view(T, K, -1).sum(dim=1)
        return (
            dx_TD,
            None,
            dweights_TK,
            _multiply_rows(dgate_RF, x_RD, sizes),
            _multiply_rows(dup_RF, x_RD, sizes),
            ddown_EDF,
        )


def _multiply(a_RX: Tensor, b_EXY: Tensor, out_RY: Tensor, sizes: list[int], add: bool = False) -> None:
    """out = a b, or out += a b, each expert's rows with its own matrix."""
    for a, b, out in zip(a_RX.split(sizes), b_EXY.unbind(), out_RY.split(sizes), strict=True):
        if a.shape[0]:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def _multiply_rows(a_RX: Tensor, b_RY: Tensor, sizes: list[int]) -> Tensor:
    """aT b over each expert's rows, [E, X, Y]; zero where it has none."""
    out_EXY = a_RX.new_empty(len(sizes), a_RX.shape[1], b_RY.shape[1])
    for a, b, out in zip(a_RX.mT.split(sizes, dim=1), b_RY.split(sizes), out_EXY.unbind(), strict=True):
        torch.mm(a, b, out=out)
    return out_EXY


_apply: Callable[..., Tensor] = _Grouped.apply


def _sort(ids_TK: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, list[int]]:
    """Each pair's row [P]; each row's pair [R], 0 where it is padding; how many rows each expert has."""
    ids_P = ids_TK.flatten()
    order_P = ids_P.argsort(stable=True)
    counts_E = torch.bincount(ids_P, minlength=experts)
    room_E = (counts_E + multiple - 1) // multiple * multiple
    shift_E = (room_E - counts_E).cumsum(0) - (room_E - counts_E)  # how far padding moves an expert's rows
    rows_P = torch.arange(ids_P.numel(), device=ids_P.device) + shift_E[ids_P[order_P]]
    slots_P = torch.empty_like(ids_P)
    slots_P[order_P] = rows_P
    sizes: list[int] = room_E.tolist()
    pairs_R = ids_P.new_zeros(sum(sizes))
    pairs_R[rows_P] = order_P
    return slots_P, pairs_R, sizes


def _row_multiple(x_TD: Tensor) -> int:
    """oneDNN builds a kernel for each new bfloat16 shape, which costs more than the product: let shapes repeat."""
    return 64 if x_TD.dtype == torch.bfloat16 and x_TD.device.type == "cpu" and x_TD.shape[0] >= 64 else 1
