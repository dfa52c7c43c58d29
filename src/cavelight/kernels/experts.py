"""The routed experts of one layer: every token through its chosen ones, weighted and summed, and a plain twin.

Letters: T tokens, K experts a token, E experts, D hidden size, F expert width, P = T * K pairs of token and expert,
R rows: the pairs sorted by expert (each expert's rows padded to a multiple, where that pays).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALL_MATRIX = 1 << 16  # elements of one expert's matrix that are quicker copied than sorted for
FEW_PAIRS = 32
ROWS_AT_ONCE = 1024


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


def streamed(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: int, matrices: Callable[[int], Sequence[Tensor]]
) -> Tensor:
    """As `grouped`, for running only, where `matrices` makes an expert's gate, up and down when it is its turn."""
    slots_TK, tokens_R, sizes = _sort(ids_TK, experts, 1)
    x_RD = x_TD[tokens_R]
    y_RD = torch.empty_like(x_RD)
    for expert, (x, y) in enumerate(zip(x_RD.split(sizes), y_RD.split(sizes), strict=True)):
        if len(x):
            gate_FD, up_FD, down_DF = matrices(expert)
            y.copy_(F.linear(F.silu(F.linear(x, gate_FD)).mul_(F.linear(x, up_FD)), down_DF))
    return torch.bmm(weights_TK[:, None].to(y_RD.dtype), y_RD[slots_TK])[:, 0]


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
    """Forward and backward by hand, some rows at a time, which a core's cache holds, added into their tokens' rows.

    Kept are the products with gate and up alone: rows of x are gathered anew, and the weights' gradient, which is
    dy_t down a, is taken between a and dy_t down, so that no expert's output is needed.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *matrices: Tensor) -> Tensor:
        gate_EFD, up_EFD, down_EDF = matrices
        slots_TK, tokens_R, sizes = _sort(ids_TK, gate_EFD.shape[0], _row_multiple(x_TD))
        gate_RF, up_RF = (x_TD.new_empty(tokens_R.shape[0], gate_EFD.shape[1]) for _ in matrices[:2])
        weights_R1 = _by_row(weights_TK.to(x_TD.dtype), slots_TK, tokens_R)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for experts, rows, sizes_e in _groups(sizes):
            x_rD, gate_rF, up_rF = x_TD.index_select(0, tokens_R[rows]), gate_RF[rows], up_RF[rows]
            _multiply(x_rD, gate_EFD[experts].mT, gate_rF, sizes_e)
            _multiply(x_rD, up_EFD[experts].mT, up_rF, sizes_e)
            y_rD = x_rD  # of the same shape, and used up
            _multiply(F.silu(gate_rF).mul_(up_rF).mul_(weights_R1[rows]), down_EDF[experts].mT, y_rD, sizes_e)
            y_TD.index_add_(0, tokens_R[rows], y_rD.float())
        ctx.save_for_backward(x_TD, gate_RF, up_RF, weights_R1, slots_TK, tokens_R, *matrices)
        ctx.sizes, ctx.dtype = sizes, weights_TK.dtype
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_RF, up_RF, weights_R1, slots_TK, tokens_R, *matrices = ctx.saved_tensors
        (dy_TD,), (gate_EFD, up_EFD, down_EDF) = grads, matrices
        dgate_EFD, dup_EFD, ddown_EDF = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in matrices)
        dweights_R, dx_TD = torch.empty_like(weights_R1[:, 0]), torch.zeros_like(x_TD, dtype=torch.float32)
        for experts, rows, sizes_e in _groups(ctx.sizes):
            x_rD, dy_rD = x_TD.index_select(0, tokens_R[rows]), dy_TD.index_select(0, tokens_R[rows])
            gate_rF, up_rF, weights_r1 = gate_RF[rows], up_RF[rows], weights_R1[rows]
            silu_rF, da_rF = F.silu(gate_rF), torch.empty_like(gate_rF)
            a_rF = silu_rF * up_rF
            _multiply(dy_rD, down_EDF[experts], da_rF, sizes_e)
            dweights_R[rows] = torch.linalg.vecdot(da_rF, a_rF)
            _multiply_rows(dy_rD, a_rF.mul_(weights_r1), ddown_EDF[experts], sizes_e)
            dup_rF = silu_rF.mul_(da_rF.mul_(weights_r1))
            dgate_rF = torch.ops.aten.silu_backward(da_rF.mul_(up_rF), gate_rF)
            _multiply_rows(dgate_rF, x_rD, dgate_EFD[experts], sizes_e)
            _multiply_rows(dup_rF, x_rD, dup_EFD[experts], sizes_e)
            dx_rD = dy_rD  # of the same shape, and used up
            _multiply(dgate_rF, gate_EFD[experts], dx_rD, sizes_e)
            _multiply(dup_rF, up_EFD[experts], dx_rD, sizes_e, add=True)
            dx_TD.index_add_(0, tokens_R[rows], dx_rD.float())
        dweights_TK = dweights_R[slots_TK].to(ctx.dtype)
        return dx_TD.to(x_TD.dtype), None, dweights_TK, dgate_EFD, dup_EFD, ddown_EDF


def _by_row(weights_TK: Tensor, slots_TK: Tensor, tokens_R: Tensor) -> Tensor:
    """Each row's weight in its token's sum, [R, 1]. A padding row's is zero: it is in no sum and no gradient."""
    weights_R1 = weights_TK.new_zeros(tokens_R.shape[0], 1)
    weights_R1[slots_TK.flatten(), 0] = weights_TK.flatten()
    return weights_R1


def _groups(sizes: list[int]) -> Iterator[tuple[slice, slice, list[int]]]:
    """Experts with about ROWS_AT_ONCE rows together (one with more is alone), their rows, and how many each has."""
    first, start, rows = 0, 0, 0
    for expert, size in enumerate([*sizes, ROWS_AT_ONCE]):
        if expert > first and (rows + size > ROWS_AT_ONCE or expert == len(sizes)):
            yield slice(first, expert), slice(start, start + rows), sizes[first:expert]
            first, start, rows = expert, start + rows, 0
        rows += size


def _multiply(a_RX: Tensor, b_EXY: Tensor, out_RY: Tensor, sizes: list[int], add: bool = False) -> None:
    """out = a b, or out += a b, each expert's rows with its own matrix."""
    for a, b, out in zip(a_RX.split(sizes), b_EXY.unbind(), out_RY.split(sizes), strict=True):
        if a.shape[0]:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def _multiply_rows(a_RX: Tensor, b_RY: Tensor, out_EXY: Tensor, sizes: list[int]) -> None:
    """out = aT b over each expert's rows; zero where it has none."""
    for a, b, out in zip(a_RX.mT.split(sizes, dim=1), b_RY.split(sizes), out_EXY.unbind(), strict=True):
        torch.mm(a, b, out=out)


_apply: Callable[..., Tensor] = _Grouped.apply


def _sort(ids_TK: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, list[int]]:
    """Each pair's row [T, K]; each row's token [R], 0 where it is padding; how many rows each expert has."""
    ids_P = ids_TK.flatten()
    order_P = ids_P.argsort(stable=True)
    counts_E = torch.bincount(ids_P, minlength=experts)
    room_E = (counts_E + multiple - 1) // multiple * multiple
    shift_E = (room_E - counts_E).cumsum(0) - (room_E - counts_E)  # how far padding moves an expert's rows
    rows_P = torch.arange(ids_P.numel(), device=ids_P.device) + shift_E[ids_P[order_P]]
    slots_TK = ids_TK.new_empty(ids_TK.shape)
    slots_TK.view(-1)[order_P] = rows_P
    sizes: list[int] = room_E.tolist()
    tokens_R = ids_P.new_zeros(sum(sizes))
    tokens_R[rows_P] = order_P // ids_TK.shape[1]
    return slots_TK, tokens_R, sizes


def _row_multiple(x_TD: Tensor) -> int:
    """oneDNN builds a kernel for each new bfloat16 shape, which costs more than the product: let shapes repeat."""
    return 64 if x_TD.dtype == torch.bfloat16 and x_TD.device.type == "cpu" and x_TD.shape[0] >= 64 else 1
