"""Recomputation: what the backward pass makes anew instead of keeping it since the forward pass.

selective, as the V3 report has it (sections 3.2.3 and 3.3.3): norms, the up-projections of MLA and the products inside
SwiGLU are made again; what the down-projections and the attention kernel made is kept, and so is what experts and, in
float32, any SwiGLU keep, which remake their own product anyway. full: of each layer only its input is kept. Values and
gradients are the same to the bit, since the same operations run on the same numbers; routing is handed back once, by
the forward pass.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from cavelight.model.block import Block
from cavelight.model.layers import SwiGLU
from cavelight.model.mla import MLA
from cavelight.model.transformer import Transformer
from cavelight.spec.sections import Recompute

Given = ParamSpec("Given")
Made = TypeVar("Made")

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(model: Transformer, how: Recompute) -> None:
    """From now on `model` keeps less for its backward pass. Its parameters and their names stay as they are."""
    for module in model.modules():
        own = vars(module)  # what is put here comes before the class's methods
        if how == "full" and isinstance(module, Block):
            own["forward"] = _remade(module.forward)
        elif how == "selective" and isinstance(module, Block):
            own["attention"] = _remade(module.attention, _down_projections(module))
        elif how == "selective" and isinstance(module, SwiGLU) and not module.trains_as_one:
            own["forward"] = _remade(module.forward, (module.gate_proj, module.up_proj))


def _down_projections(block: Block) -> tuple[nn.Module, ...]:
    """Without query compression the queries are no cheap up-projection: they count among what is kept."""
    attention = block.self_attn
    if not isinstance(attention, MLA):
        return tuple(module for name, module in attention.named_children() if name in ("q_proj", "k_proj", "v_proj"))
    queries = attention.q_proj if attention.config.q_lora_rank is None else attention.q_a_proj
    return queries, attention.kv_a_proj_with_mqa


def _remade(work: Callable[Given, Made], kept: tuple[nn.Module, ...] = ()) -> Callable[Given, Made]:
    """`work`, run again by the backward pass, but for the products of these modules and for attention itself."""

    def policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
        if operation in _ATTENTION or (operation is torch.ops.aten.mm.default and _is_one_of(inputs[1], kept)):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy) if kept else noop_context_fn

    @wraps(work)
    def remade(*given: Given.args, **named: Given.kwargs) -> Made:
        if not torch.is_grad_enabled():
            return work(*given, **named)
        # Nothing in the model is drawn by chance, so no random state has to be kept.
        bound = partial(work, *given, **named)
        made: Made = checkpoint(bound, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return made

    return remade


def _is_one_of(factor: torch.Tensor, modules: tuple[nn.Module, ...]) -> bool:
    """Whether a factor of a product is one of these modules' weights, of which torch hands over a view."""
    return any(factor.data_ptr() == module.get_parameter("weight").data_ptr() for module in modules)
