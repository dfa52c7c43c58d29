"""Training in fp8 (V3 report, section 3.3): a model's Linears and experts exchanged for ones that compute in it.

The parameters stay the very same objects under the same names, in the dtype they had: optimizer, checkpoints and
exports notice nothing. What the report keeps in higher precision stays as it is (embedding, head, gates, norms, the
attention itself), and so does the MTP projection, which released checkpoints store in bfloat16.

Not imitated: how the report stores activations between forward and backward pass (E5M6 before the output projection,
fp8 before SwiGLU), and the 14 bits in which its GPUs add up 128 products.

Letters: T tokens, K experts a token, D hidden size, H heads, N width without position, R rotary width, U value width,
C latent width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cavelight.kernels import fp8
from cavelight.model.layers import Linear
from cavelight.model.mla import MLA
from cavelight.model.moe import Experts
from cavelight.model.ports import Attend
from cavelight.model.transformer import Transformer
from cavelight.spec.formats import PACKED_ROLES
from cavelight.spec.shapes import parameters


class Fp8Linear(Linear):
    """y = x Wᵀ with all three products in fp8, around a weight that exists."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.weight.dtype, torch.device("meta"))
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return fp8.linear(x, self.weight)


class Fp8Experts(Experts):
    """A layer's routed experts with all nine products in fp8, around matrices that exist."""

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = experts.gate_proj, experts.up_proj, experts.down_proj

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return fp8.grouped(x_TD, ids_TK, weights_TK, self.gate_proj, self.up_proj, self.down_proj)


@dataclass(frozen=True)
class Fp8Latents:
    """An `Attend` that is handed the latent and both up-projections as fp8 has them, so that keys and values come out
    as those of the report's kv_b_proj.

    Their gradients are made from these numbers too, but not rounded themselves: they arise inside attention.
    """

    attend: Attend

    def __call__(
        self,
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        k_up_HNC: Tensor,
        v_up_HUC: Tensor,
        scale: float,
    ) -> Tensor:
        heads, widths = k_up_HNC.shape[0], [k_up_HNC.shape[1], v_up_HUC.shape[1]]
        kv_b_XC = torch.cat([k_up_HNC, v_up_HUC], dim=1).flatten(0, 1)  # blocks lie as in the checkpoint's matrix
        k_up_HNC, v_up_HUC = fp8.rounded(kv_b_XC, fp8.BLOCK).unflatten(0, (heads, -1)).split(widths, dim=1)
        c_TC = fp8.rounded(c_TC, fp8.TILE)
        return self.attend(layer, q_nope_THN, q_rope_THR, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, scale)


def emulate(model: Transformer) -> None:
    """Let the model compute in fp8 from now on, trunk and MTP modules alike.

    Exchanged are, by their role in the shape table, the Linears of attention, dense feed-forwards and shared experts,
    and the stacks of routed experts; the up-projections of the latent are rounded on their way into attention. A
    second call changes nothing.
    """
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        return
    for parameter in parameters(model.config):
        if parameter.role not in PACKED_ROLES:
            continue
        module, _, last = parameter.name.rpartition(".")
        parent, _, name = module.rpartition(".")
        old = model.get_submodule(module)
        if last == "weight" and isinstance(old, Linear):
            setattr(model.get_submodule(parent), name, Fp8Linear(old))
        elif last == "gate_proj" and isinstance(old, Experts):
            setattr(model.get_submodule(parent), name, Fp8Experts(old))
        elif last == "k_up" and isinstance(old, MLA):
            old.register_forward_pre_hook(_round_latents)


def _round_latents(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of `MLA.forward(layer, x, cos_sin, attend)`."""
    *others, attend = arguments
    return *others, Fp8Latents(attend)
