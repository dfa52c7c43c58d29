"""Plain attention, to compare latent attention with: grouped queries (arXiv 2305.13245), MHA and MQA as its ends.

Letters: T tokens, D hidden size, H heads, g key-value heads, R width of a head's query and key, all of it rotary,
U value width, C = g (R + U).
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from cavelight.model.layers import Linear, rotate
from cavelight.model.mla import softmax_scale
from cavelight.model.ports import Attend
from cavelight.spec.config import ModelConfig


class GQA(nn.Module):
    """Each of g key-value heads serves H / g query heads. Parameters bear Llama's names.

    To `Attend` this is latent attention of a kind: the latent of a token is its keys and values themselves, past RoPE,
    and the up-projections are constants of zeros and ones that pick each head's part. So the cache holds g (R + U)
    numbers a token and layer, as it should, and nothing behind the port differs. But picking by products costs time:
    the speed of such a model is no measure of plain attention.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        D, H, g = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        R, U = config.qk_rope_head_dim, config.v_head_dim
        self.sizes = (H, g, R, U)
        self.q_proj = Linear(D, H * R, dtype, device)
        self.k_proj = Linear(D, g * R, dtype, device)
        self.v_proj = Linear(D, g * U, dtype, device)
        self.o_proj = Linear(H * U, D, dtype, device)
        self.scale = softmax_scale(config)

    def forward(self, layer: int, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        R = self.sizes[2]
        q_THR = rotate(self.q_proj(x_TD).unflatten(-1, (-1, R)), cos_sin)
        k_TgR = rotate(self.k_proj(x_TD).unflatten(-1, (-1, R)), cos_sin)
        c_TC = torch.cat([k_TgR.flatten(1), self.v_proj(x_TD)], dim=-1)
        k_up_HRC, v_up_HUC = picks(*self.sizes, c_TC.dtype, c_TC.device)
        o_THU = attend(layer, q_THR, q_THR[..., :0], c_TC, c_TC[:, :0], k_up_HRC, v_up_HUC, self.scale)
        y_TD: Tensor = self.o_proj(o_THU.flatten(1))
        return y_TD


@lru_cache(maxsize=8)
def picks(H: int, g: int, R: int, U: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What picks each head's key [H, R, C] and value [H, U, C] out of a row that holds g keys and then g values."""
    with torch.inference_mode(False):  # else the first use of a process could make them unfit for training
        group_H = torch.arange(H, device=device) // (H // g)
        of_group_Hg = torch.eye(g, dtype=dtype, device=device)[group_H]
        keys_HRgR, values_HUgU = (
            torch.einsum("hg,xy->hxgy", of_group_Hg, torch.eye(width, dtype=dtype, device=device)) for width in (R, U)
        )
        k_HRC = torch.cat([keys_HRgR.flatten(2), keys_HRgR.new_zeros(H, R, g * U)], dim=-1)
        v_HUC = torch.cat([values_HUgU.new_zeros(H, U, g * R), values_HUgU.flatten(2)], dim=-1)
        return k_HRC, v_HUC
