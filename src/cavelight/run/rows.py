"""How a cache keeps its rows: as numbers of the model's dtype, or smaller, the latent in integers of 8 bits.

Letters: L numbers of a row, C of them its latent and R its rotary key, W numbers of `dtype` that it is stored in,
G groups of GROUP numbers of the latent, X = GROUP.

torch.int8 stands for rows of C integers, then G float32 scales, then R bfloat16 numbers, all as bytes: the layout that
FlashMLA has for its fp8 cache, with integers in it. Rotary keys are not quantised: their numbers differ too much.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig

GROUP = 128
MOST = 127  # of an integer
CacheDtype = Literal["auto", "int8"]
CACHE_DTYPES: dict[str, CacheDtype] = {name: name for name in get_args(CacheDtype)}


def named(text: str) -> CacheDtype:
    """Raises UserError for a name that is none."""
    if text not in CACHE_DTYPES:
        raise UserError("There is no such cache here", got=repr(text), do=f"choose one of {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[text]


def cache_dtype(config: ModelConfig, weights: torch.dtype, wanted: CacheDtype = "auto") -> torch.dtype:
    """What a cache is made of: "auto" as the weights are. Raises UserError for other names and models without MLA."""
    if named(wanted) == "auto":
        return weights
    config.check_latent("A cache in int8")
    return torch.int8


def row_width(config: ModelConfig, dtype: torch.dtype) -> int:
    """W."""
    if dtype != torch.int8:
        return config.cache_width
    C = config.kv_lora_rank
    return C + 4 * _groups(C) + 2 * (config.cache_width - C)


def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one token in one layer."""
    return row_width(config, dtype) * dtype.itemsize


def pack(rows_TL: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """[T, W] in `dtype`."""
    if dtype != torch.int8:
        return rows_TL.to(dtype)
    c_TC, k_rope_TR = rows_TL.float().split([C, rows_TL.shape[1] - C], dim=-1)
    c_TGX = F.pad(c_TC, (0, -C % GROUP)).unflatten(-1, (-1, GROUP))
    scale_TG = c_TGX.abs().amax(dim=-1) / MOST
    whole_TGX = (c_TGX / scale_TG[..., None]).round()
    whole_TGX = whole_TGX.masked_fill(~(scale_TG[..., None] > 0), 0)  # of nothing, or NaN, which its scale tells
    parts = whole_TGX.flatten(1)[:, :C].to(torch.int8), scale_TG, k_rope_TR.bfloat16()
    return torch.cat([part.contiguous().view(torch.int8) for part in parts], dim=-1)


def unpack(stored_SW: Tensor, C: int) -> Tensor:
    """[S, L]: of int8 in float32, else as it is stored."""
    if stored_SW.dtype != torch.int8:
        return stored_SW
    G = _groups(C)
    c_SC, scale_SX, k_rope_SX = stored_SW.split([C, 4 * G, stored_SW.shape[1] - C - 4 * G], dim=-1)
    scale_SG = scale_SX.clone(memory_format=torch.contiguous_format).view(torch.float32)
    k_rope_SR = k_rope_SX.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    scale_SC = scale_SG.repeat_interleave(GROUP, dim=-1)[:, :C]
    return torch.cat([c_SC * scale_SC, k_rope_SR.float()], dim=-1)


def _groups(C: int) -> int:
    return -(-C // GROUP)
