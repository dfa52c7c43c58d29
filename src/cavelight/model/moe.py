"""DeepSeekMoE: fine routed experts beside shared ones (V3 report, eq. 12).

Letters: T tokens, D hidden size, E experts, K experts a token, F expert width.
"""

import torch
from torch import Tensor, nn

from cavelight.kernels import experts
from cavelight.model.layers import SwiGLU
from cavelight.model.ports import Dispatch
from cavelight.model.router import Router, Routing
from cavelight.spec.config import ModelConfig


class Experts(nn.Module):
    """The routed experts' matrices, stacked."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        E, F, D = config.n_routed_experts or 0, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(E, F, D, dtype=dtype, device=device))
        self.up_proj = nn.Parameter(torch.empty(E, F, D, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(E, D, F, dtype=dtype, device=device))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return experts.grouped(x_TD, ids_TK, weights_TK, self.gate_proj, self.up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts by way of `Dispatch`, plus the shared ones, which are never scaled."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.gate = Router(config, dtype, device)
        self.experts = Experts(config, dtype, device)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = SwiGLU(config.hidden_size, width, dtype, device)

    def forward(self, layer: int, x_TD: Tensor, dispatch: Dispatch) -> tuple[Tensor, Routing]:
        routing: Routing = self.gate(x_TD)
        y_TD = dispatch(layer, x_TD, routing.ids_TK, routing.weights_TK, self.experts)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD, routing
