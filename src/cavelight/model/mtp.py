"""Multi-token prediction: one module predicts one token further (V3 report, section 2.2, eq. 21-23).

Letters: T tokens, D hidden size.
"""

import torch
from torch import Tensor, nn

from cavelight.model.block import Block
from cavelight.model.layers import Linear, RMSNorm
from cavelight.model.ports import Attend, Dispatch
from cavelight.model.router import Routing
from cavelight.spec.config import ModelConfig


class MTPModule(nn.Module):
    """Joins a hidden state with the embedding of a later token and runs them through a block of its own.

    The projection's input is [embedding ; hidden], as released checkpoints have it; the report writes the reverse.
    """

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(D, eps, dtype, device)
        self.hnorm = RMSNorm(D, eps, dtype, device)
        self.eh_proj = Linear(2 * D, D, dtype, device)
        self.block = Block(config, layer, dtype, device)
        self.norm = RMSNorm(D, eps, dtype, device)

    def forward(
        self,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        attend: Attend,
        dispatch: Dispatch,
    ) -> tuple[Tensor, Routing | None]:
        x_TD = self.eh_proj(torch.cat([self.enorm(embedding_TD), self.hnorm(hidden_TD)], dim=-1))
        result: tuple[Tensor, Routing | None] = self.block(x_TD, cos_sin, attend, dispatch)
        return result
