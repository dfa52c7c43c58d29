"""Causal attention of whole sequences on a CPU in float32: torch's flash kernel, and a faster way back.

Letters: T tokens of all sequences end to end, H heads, N width without position, R rotary width, U value width, C
latent width, X = N + R, W the larger of X and U, Y the N or U of all heads; M heads (or heads times sequences),
t queries and s keys of one block.

The way back makes the probabilities anew a block at a time from the logsumexp that the forward pass left behind
(FlashAttention: arXiv 2205.14135, algorithm 4), as torch's does, but as products of whole stacks of matrices, with
nothing computed for the columns that values are padded by: a quarter to a third less time on the processor measured.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES, KEYS = 128, 512  # of a block: KEYS a multiple of QUERIES
TOKENS_AT_ONCE = 2048  # of sequences that go through together: a share of a batch's keys and values stands at a time
SCORES_AT_ONCE = 1 << 17  # of a block over its heads: they stay in a core's cache
LEAST = -50.0  # e to this is nothing beside 1, and its products are still no denormal numbers, which are slow

Latents = tuple[Tensor, Tensor, Tensor, Tensor]  # c_tC, k_rope_tR, k_up_HNC, v_up_HUC


def causal(
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    c_TC: Tensor,
    k_rope_TR: Tensor,
    k_up_HNC: Tensor,
    v_up_HUC: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> Tensor:
    """softmax(scale q k^T) v, each token seeing itself and those before it in its sequence: [T, H, U].

    `lengths` are those of the sequences. Keys and values are raised from the latent, in both passes: that is cheaper
    than their room. All heads share the rotary key.
    """
    o_THU: Tensor = _apply(q_nope_THN, q_rope_THR, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, lengths, scale)
    return o_THU


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q_nope_THN, q_rope_THR, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, lengths, scale = inputs
        (T, H, N), U = q_nope_THN.shape, v_up_HUC.shape[1]
        X = N + q_rope_THR.shape[2]
        W = max(X, U)  # the flash kernel is only taken for equal widths; zeros change neither scores nor values
        q_HTW = _heads_first((q_nope_THN, q_rope_THR), W).mul_(scale)
        o_THU, logsumexp_HT1 = q_HTW.new_empty(T, H, U), q_HTW.new_empty(H, T, 1)
        for some, B in _sequences(lengths):
            latents = c_TC[some], k_rope_TR[some], k_up_HNC, v_up_HUC
            _attend(B, q_HTW[:, some], latents, o_THU[some], logsumexp_HT1[:, some, 0])
        ctx.save_for_backward(q_HTW, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, o_THU, logsumexp_HT1)
        ctx.lengths, ctx.scale = lengths, scale
        return o_THU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_HTW, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, o_THU, logsumexp_HT1 = ctx.saved_tensors
        (do_THU,), N = grads, k_up_HNC.shape[1]
        X = N + k_rope_TR.shape[1]
        dq_THX, dc_TC, dk_rope_TR = (torch.empty_like(t) for t in (q_HTW[..., :X].transpose(0, 1), c_TC, k_rope_TR))
        dk_up_HNC, dv_up_HUC = (up.new_zeros(up.shape) for up in (k_up_HNC, v_up_HUC))
        ups = [
            dup if wanted else None
            for dup, wanted in zip((dk_up_HNC, dv_up_HUC), ctx.needs_input_grad[4:6], strict=True)
        ]
        for some, B in _sequences(ctx.lengths):
            latents = c_TC[some], k_rope_TR[some], k_up_HNC, v_up_HUC
            given = q_HTW[:, some, :X], latents, do_THU[some], o_THU[some], logsumexp_HT1[:, some]
            _way_back(B, ctx.scale, *given, (dq_THX[some], dc_TC[some], dk_rope_TR[some]), ups)
        return dq_THX[..., :N], dq_THX[..., N:], dc_TC, dk_rope_TR, dk_up_HNC, dv_up_HUC, None, None


# Functions of their own for some sequences, so that nothing of these stands beside the next ones'.


def _attend(B: int, q_HtW: Tensor, latents: Latents, o_tHU: Tensor, logsumexp_Ht: Tensor) -> None:
    """B sequences of one length, into the last two."""
    W, U = q_HtW.shape[2], o_tHU.shape[2]
    q, k, v = (t.unflatten(1, (B, -1)).transpose(0, 1) for t in (q_HtW, *_raise(*latents, W, W)))
    o_BHtW, logsumexp_BHt = _flash(q, k, v, is_causal=True, scale=1.0)
    o_tHU.unflatten(0, (B, -1)).copy_(o_BHtW[..., :U].transpose(1, 2))
    logsumexp_Ht.unflatten(1, (B, -1)).copy_(logsumexp_BHt.transpose(0, 1))


def _way_back(
    B: int,
    scale: float,
    q_HtX: Tensor,
    latents: Latents,
    do_tHU: Tensor,
    o_tHU: Tensor,
    logsumexp_Ht1: Tensor,
    made: tuple[Tensor, Tensor, Tensor],
    ups: Sequence[Tensor | None],
) -> None:
    """The gradients of queries and latents, into `made`; those of the up-projections that are no constants, added."""
    (c_tC, _, k_up_HNC, v_up_HUC), (dq_tHX, dc_tC, dk_rope_tR) = latents, made
    N = k_up_HNC.shape[1]
    dq_HtX, dk_HtX, dv_HtU = _heads_back(B, q_HtX, latents, do_tHU, o_tHU, logsumexp_Ht1)
    dq_tHX.copy_(dq_HtX.mul_(scale).transpose(0, 1))
    torch.sum(dk_HtX[..., N:], dim=0, out=dk_rope_tR)
    dk_tY, dv_tY = (d_HtX.transpose(0, 1).flatten(1) for d_HtX in (dk_HtX[..., :N], dv_HtU))
    torch.mm(dk_tY, k_up_HNC.flatten(0, 1), out=dc_tC).addmm_(dv_tY, v_up_HUC.flatten(0, 1))
    for dup_HXC, d_tY in zip(ups, (dk_tY, dv_tY), strict=True):
        if dup_HXC is not None:
            dup_HXC.flatten(0, 1).addmm_(d_tY.mT, c_tC)


def _heads_back(
    B: int, q_HtX: Tensor, latents: Latents, do_tHU: Tensor, o_tHU: Tensor, logsumexp_Ht1: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of scaled queries, keys and values."""
    k_HtX, v_HtU = _raise(*latents, q_HtX.shape[2], o_tHU.shape[2])
    delta_Ht1 = torch.linalg.vecdot(do_tHU, o_tHU).mT[..., None].contiguous()
    made = tuple(t.new_zeros(t.shape) for t in (q_HtX, k_HtX, v_HtU))
    given = (q_HtX, k_HtX, v_HtU, _heads_first((do_tHU,), v_HtU.shape[2]), logsumexp_Ht1, delta_Ht1)
    _backward(*(t.unflatten(1, (B, -1)).flatten(0, 1) for t in (*given, *made)))
    return made


def _raise(
    c_TC: Tensor, k_rope_TR: Tensor, k_up_HNC: Tensor, v_up_HUC: Tensor, k_width: int, v_width: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads from the latent, [H, T, k_width] and [H, T, v_width]."""
    H = k_up_HNC.shape[0]
    k_nope_THN, v_THU = (F.linear(c_TC, up.flatten(0, 1)).unflatten(1, up.shape[:2]) for up in (k_up_HNC, v_up_HUC))
    k_HTW = _heads_first((k_nope_THN, k_rope_TR[:, None].expand(-1, H, -1)), k_width)
    return k_HTW, _heads_first((v_THU,), v_width)


def _backward(
    q_MtX: Tensor,
    k_MsX: Tensor,
    v_MsU: Tensor,
    do_MtU: Tensor,
    logsumexp_Mt1: Tensor,
    delta_Mt1: Tensor,
    dq_MtX: Tensor,
    dk_MsX: Tensor,
    dv_MsU: Tensor,
) -> None:
    """Adds the gradients of scaled queries, keys and values to the last three; delta is do times o."""
    seen_tt = q_MtX.new_ones(QUERIES, QUERIES).tril_()
    for m, t, s in _blocks(*q_MtX.shape[:2]):
        q_mtX, k_msX, do_mtU = q_MtX[m, t], k_MsX[m, s], do_MtU[m, t]
        log_p_mts = torch.bmm(q_mtX, k_msX.mT).sub_(logsumexp_Mt1[m, t])
        p_mts = log_p_mts.clamp_(LEAST, 1.0).exp_()  # above 0 they are by rounding alone, or not to be seen
        if s.stop == t.stop:
            queries = t.stop - t.start
            p_mts[..., -queries:] *= seen_tt[:queries, :queries]
        dv_MsU[m, s].baddbmm_(p_mts.mT, do_mtU)
        dscores_mts = p_mts.mul_(torch.bmm(do_mtU, v_MsU[m, s].mT).sub_(delta_Mt1[m, t]))
        dq_MtX[m, t].baddbmm_(dscores_mts, k_msX)
        dk_MsX[m, s].baddbmm_(dscores_mts.mT, q_mtX)


def _blocks(M: int, T: int) -> Iterator[tuple[slice, slice, slice]]:
    """Heads, queries and keys. All keys are seen by all queries, but for blocks that end with the same token."""
    heads = max(SCORES_AT_ONCE // (min(QUERIES, T) * min(KEYS, T)), 1)
    for m in range(0, M, heads):
        for s in range(0, T, KEYS):
            for t in range(s, T, QUERIES):
                stop = min(t + QUERIES, T)
                yield slice(m, m + heads), slice(t, stop), slice(s, min(s + KEYS, stop))


def _sequences(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Their tokens, and how many sequences they are: as many of one length as have TOKENS_AT_ONCE together."""
    start = 0
    for length, same in groupby(lengths):
        left = len(list(same))
        while left:
            count = min(left, max(TOKENS_AT_ONCE // length, 1))
            yield slice(start, start + count * length), count
            start, left = start + count * length, left - count


def _heads_first(parts_THX: Sequence[Tensor], width: int) -> Tensor:
    """Side by side, and zeros where they are narrower than `width`: [H, T, width]."""
    T, H, _ = parts_THX[0].shape
    made_HTW, start = parts_THX[0].new_empty(H, T, width), 0
    for part_THX in parts_THX:
        made_HTW[..., start : start + part_THX.shape[2]] = part_THX.transpose(0, 1)
        start += part_THX.shape[2]
    made_HTW[..., start:] = 0
    return made_HTW


_apply: Callable[..., Tensor] = _Causal.apply
_flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
