"""Multi-head latent attention (V2 report, section 2.1; V3 report, section 2.1.1, eq. 1-11).

Letters: T tokens, D hidden size, H heads, N width without position, R rotary width, U value width, C latent width.
"""

import torch
from torch import Tensor, nn

from cavelight.model.layers import Linear, RMSNorm, rotate, yarn_mscale
from cavelight.model.ports import Attend
from cavelight.spec.config import ModelConfig

LATENT_NORM_EPS = 1e-6  # both latents' norms, whatever rms_norm_eps says: as transformers has it


class MLA(nn.Module):
    """Queries per head; keys and values of all heads from one latent and one rotary key a token."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.config = config
        D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, R, U = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, H * (N + R), dtype, device)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank, dtype, device)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype, device)
            self.q_b_proj = Linear(config.q_lora_rank, H * (N + R), dtype, device)
        self.kv_a_proj_with_mqa = Linear(D, C + R, dtype, device)
        self.kv_a_layernorm = RMSNorm(C, LATENT_NORM_EPS, dtype, device)
        self.k_up = nn.Parameter(torch.empty(H, N, C, dtype=dtype, device=device))
        self.v_up = nn.Parameter(torch.empty(H, U, C, dtype=dtype, device=device))
        self.o_proj = Linear(H * U, D, dtype, device)
        self.scale = softmax_scale(config)

    def forward(self, layer: int, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        config = self.config
        N, R, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        q_THX = self.queries(x_TD).unflatten(-1, (config.num_attention_heads, N + R))
        q_nope_THN, q_rope_THR = q_THX.split([N, R], dim=-1)
        c_TC, k_rope_TR = self.kv_a_proj_with_mqa(x_TD).split([C, R], dim=-1)
        o_THU = attend(
            layer,
            q_nope_THN,
            rotate(q_rope_THR, cos_sin),
            self.kv_a_layernorm(c_TC),
            rotate(k_rope_TR[:, None], cos_sin)[:, 0],
            self.k_up,
            self.v_up,
            self.scale,
        )
        y_TD: Tensor = self.o_proj(o_THU.flatten(1))
        return y_TD

    def queries(self, x_TD: Tensor) -> Tensor:
        """All heads' queries side by side, [T, H * (N + R)], compressed first where the model does so."""
        q: Tensor
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_TD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))
        return q


def softmax_scale(config: ModelConfig) -> float:
    """(N + R)^-1/2, with YaRN times m(mscale_all_dim)^2: the second place in which YaRN scales."""
    scale: float = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    return scale * yarn_mscale(yarn, yarn.mscale_all_dim) ** 2 if yarn else scale
