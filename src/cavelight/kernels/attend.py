"""Causal attention over MLA's latent rows, in its two forms and as a plain twin of both.

Letters: B sequences of equal length, T queries (where there is no B: of all sequences end to end), S rows (the past
and the T present ones, which come last), H heads, N width without position, R rotary width, U value width, C latent
width, L = C + R.

A row is what the cache keeps of a token: its latent after the norm, then its shared key after RoPE. Both forms give
the same values (V3 report, section 2.1.1; V2 report, section 2.1.2): the expanded one raises every row to keys and
values of all heads, the absorbed one takes the queries down into the latent space and leaves the rows as they are.
Both compute in the queries' numbers, whatever rows and matrices are kept in.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.kernels.causal import causal


def expanded(
    q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, rows_BSL: Tensor, k_up_HNC: Tensor, v_up_HUC: Tensor, scale: float
) -> Tensor:
    """Multi-head form, for training and prefill: [B, T, H, U]."""
    rows_BSL, k_up_HNC, v_up_HUC = (t.to(q_nope_BTHN.dtype) for t in (rows_BSL, k_up_HNC, v_up_HUC))
    B, T, H, N = q_nope_BTHN.shape
    S, C, U = rows_BSL.shape[1], k_up_HNC.shape[2], v_up_HUC.shape[1]
    c_BSC, k_rope_BSR = rows_BSL.split([C, rows_BSL.shape[2] - C], dim=-1)
    k_nope_BSHN = F.linear(c_BSC, k_up_HNC.flatten(0, 1)).view(B, S, H, N)
    v_BSHU = F.linear(c_BSC, v_up_HUC.flatten(0, 1)).view(B, S, H, U)
    q_BTHX = torch.cat([q_nope_BTHN, q_rope_BTHR], dim=-1)
    k_BSHX = torch.cat([k_nope_BSHN, k_rope_BSR[:, :, None].expand(-1, -1, H, -1)], dim=-1)
    # The CPU's flash kernel is only taken for equal head widths; zeros change neither scores nor values.
    width = max(q_BTHX.shape[-1], U)
    q_BHTW, k_BHSW, v_BHSW = (_widen(t, width).transpose(1, 2) for t in (q_BTHX, k_BSHX, v_BSHU))
    mask_TS = None if T in (1, S) else _causal_mask(T, S, rows_BSL.device)
    o_BHTW = F.scaled_dot_product_attention(q_BHTW, k_BHSW, v_BHSW, attn_mask=mask_TS, is_causal=T == S, scale=scale)
    return o_BHTW.transpose(1, 2)[..., :U]


def packed(
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    c_TC: Tensor,
    k_rope_TR: Tensor,
    k_up_HNC: Tensor,
    v_up_HUC: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> Tensor:
    """Whole sequences of these lengths end to end, for training and evaluation: [T, H, U]."""
    if c_TC.dtype == torch.float32 and c_TC.device.type == "cpu":
        return causal(q_nope_THN, q_rope_THR, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, lengths, scale)
    flat = (q_nope_THN, q_rope_THR, torch.cat([c_TC, k_rope_TR], dim=-1))
    if len(set(lengths)) == 1:  # one call over all
        q, r, rows = (t.unflatten(0, (len(lengths), lengths[0])) for t in flat)
        return expanded(q, r, rows, k_up_HNC, v_up_HUC, scale).flatten(0, 1)
    parts = zip(*(t.split(list(lengths)) for t in flat), strict=True)
    return torch.cat([expanded(q[None], r[None], s[None], k_up_HNC, v_up_HUC, scale)[0] for q, r, s in parts])


def absorbed(
    q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, rows_BSL: Tensor, k_up_HNC: Tensor, v_up_HUC: Tensor, scale: float
) -> Tensor:
    """Multi-query form, for decoding: one key and value row for all heads, read as it lies. [B, T, H, U]."""
    rows_BSL, k_up_HNC, v_up_HUC = (t.to(q_nope_BTHN.dtype) for t in (rows_BSL, k_up_HNC, v_up_HUC))
    B, T, H, _ = q_nope_BTHN.shape
    S, C = rows_BSL.shape[1], k_up_HNC.shape[2]
    q_BTHC = torch.einsum("bthn,hnc->bthc", q_nope_BTHN, k_up_HNC)
    q_BTHL = torch.cat([q_BTHC, q_rope_BTHR], dim=-1)
    scores_BTHS = (q_BTHL.flatten(1, 2) @ rows_BSL.mT).view(B, T, H, S).float() * scale
    if T > 1:
        scores_BTHS = scores_BTHS.masked_fill(~_causal_mask(T, S, rows_BSL.device)[:, None], float("-inf"))
    p_BTHS = scores_BTHS.softmax(dim=-1).to(rows_BSL.dtype)
    z_BTHC = (p_BTHS.flatten(1, 2) @ rows_BSL[..., :C]).view(B, T, H, C)
    return torch.einsum("bthc,huc->bthu", z_BTHC, v_up_HUC)


def absorbed_is_cheaper(T: int, S: int, H: int, N: int, R: int, U: int, C: int) -> bool:
    """Whether the absorbed form needs fewer multiply-adds for T queries over S rows.

    Expanding costs C(N+U) a head and row, once for all queries; absorbing costs as much a head and query. A pair of
    query and row then costs N+R+U against 2C+R (V3: 320 against 1088).
    """
    expanded_macs = S * C * (N + U) + T * S * (N + R + U)
    absorbed_macs = T * C * (N + U) + T * S * (2 * C + R)
    return absorbed_macs < expanded_macs


def plain(
    q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, rows_BSL: Tensor, k_up_HNC: Tensor, v_up_HUC: Tensor, scale: float
) -> Tensor:
    """The definition, in float32, one query and head at a time. [B, T, H, U]."""
    B, T, H, _ = q_nope_BTHN.shape
    S, C, U = rows_BSL.shape[1], k_up_HNC.shape[2], v_up_HUC.shape[1]
    o_BTHU = torch.empty(B, T, H, U)
    for b in range(B):
        for t in range(T):
            seen_SL = rows_BSL[b, : S - T + t + 1].float()
            for h in range(H):
                k_nope_SN = seen_SL[:, :C] @ k_up_HNC[h].float().T
                v_SU = seen_SL[:, :C] @ v_up_HUC[h].float().T
                scores_S = k_nope_SN @ q_nope_BTHN[b, t, h].float() + seen_SL[:, C:] @ q_rope_BTHR[b, t, h].float()
                o_BTHU[b, t, h] = (scores_S * scale).softmax(dim=0) @ v_SU
    return o_BTHU


def _causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """True where query t, which is row S-T+t, may look: [T, S]."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
