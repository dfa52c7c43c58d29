"""One layer: attention and feed-forward, each on a normalised residual stream.

Letters: T tokens, D hidden size.
"""

import torch
from torch import Tensor, nn

from cavelight.model.gqa import GQA
from cavelight.model.layers import RMSNorm, SwiGLU
from cavelight.model.mla import MLA
from cavelight.model.moe import MoE
from cavelight.model.ports import Attend, Dispatch
from cavelight.model.router import Routing
from cavelight.spec.config import ModelConfig


class Block(nn.Module):
    """x += attention(norm x); x += FFN(norm x), where FFN is dense in the first layers and a mixture after them."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.layer = layer
        self.input_layernorm = RMSNorm(D, eps, dtype, device)
        self.self_attn = (MLA if config.attention == "mla" else GQA)(config, dtype, device)
        self.post_attention_layernorm = RMSNorm(D, eps, dtype, device)
        self.mlp: MoE | SwiGLU
        if config.is_moe(layer):
            self.mlp = MoE(config, dtype, device)
        else:
            self.mlp = SwiGLU(D, config.intermediate_size, dtype, device)

    def forward(
        self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, Routing | None]:
        x_TD = x_TD + self.attention(x_TD, cos_sin, attend)
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MoE):
            y_TD, routing = self.mlp(self.layer, normed_TD, dispatch)
            return x_TD + y_TD, routing
        return x_TD + self.mlp(normed_TD), None

    def attention(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        mixed_TD: Tensor = self.self_attn(self.layer, self.input_layernorm(x_TD), cos_sin, attend)
        return mixed_TD
