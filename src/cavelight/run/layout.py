"""Where everything that kernels.native needs of some layers lies: their weights as they are stored, and their sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cavelight.kernels import native
from cavelight.model.block import Block
from cavelight.model.layers import SwiGLU
from cavelight.model.mla import LATENT_NORM_EPS, MLA
from cavelight.model.moe import MoE
from cavelight.model.router import is_group_limited

STACKS = ("gate_proj", "up_proj", "down_proj")
Parts = dict[str, Any]


def chain_of(blocks: Sequence[Block]) -> native.Chain | None:
    """Of layers with numbers that follow one another; None if some is one that only the plain modules compute."""
    layers = [layer for layer in map(_layer, blocks) if layer is not None]
    follow = all(block.layer == blocks[0].layer + n for n, block in enumerate(blocks))
    return native.Chain(layers, blocks[0].layer) if follow and len(layers) == len(blocks) else None


def matrix_of(module: nn.Module | Tensor, name: str = "") -> native.Matrix | None:
    """A matrix where it lies: given, of a Linear, or kept in a form of its own; `name`: which stack of a module's."""
    if isinstance(module, native.KeepsMatrix):
        return module.matrix_as_stored(name)
    weight = module if isinstance(module, Tensor) else getattr(module, name or "weight")
    assert isinstance(weight, Tensor)
    return native.matrix(weight)


def _layer(block: Block) -> native.Layer | None:
    attention = block.self_attn
    if not isinstance(attention, MLA) or attention.config.kv_lora_rank % native.LANES:
        return None
    config, mlp = attention.config, block.mlp
    parts = _attention(attention) | (_mixture(mlp) if isinstance(mlp, MoE) else _dense(mlp))
    parts["attention_norm"] = matrix_of(block.input_layernorm.weight[None])
    parts["ffn_norm"] = matrix_of(block.post_attention_layernorm.weight[None])
    if not _is_read(parts):
        return None
    layer = native.Layer(
        D=config.hidden_size,
        H=config.num_attention_heads,
        N=config.qk_nope_head_dim,
        R=config.qk_rope_head_dim,
        C=config.kv_lora_rank,
        U=config.v_head_dim,
        low_rank_query=config.q_lora_rank is not None,
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        softmax_scale=attention.scale,
        **{name: part.data if name == "bias" else part for name, part in parts.items()},
    )
    layer.kept = tuple(parts.values())
    return layer


def _is_read(parts: Parts) -> bool:
    """Whether each matrix is of a kind that is read; those which meet the same numbers have to be of one."""
    if any(part is None for part in parts.values()):
        return False
    pairs = (("gate", "up"), ("shared_gate", "shared_up"))
    return all(parts[a].kind == parts[b].kind for a, b in pairs if a in parts)


def _attention(attention: MLA) -> Parts:
    parts: Parts = {
        "latent_down": matrix_of(attention.kv_a_proj_with_mqa),
        "key_up": matrix_of(attention.k_up),
        "value_up": matrix_of(attention.v_up),
        "output": matrix_of(attention.o_proj),
        "latent_norm": matrix_of(attention.kv_a_layernorm.weight[None]),
    }
    if attention.config.q_lora_rank is None:
        return parts | {"query_up": matrix_of(attention.q_proj)}
    parts |= {"query_down": matrix_of(attention.q_a_proj), "query_up": matrix_of(attention.q_b_proj)}
    return parts | {"query_norm": matrix_of(attention.q_a_layernorm.weight[None])}


def _dense(mlp: SwiGLU) -> Parts:
    return {"shared": 1} | {f"shared_{name[:-5]}": matrix_of(getattr(mlp, name)) for name in STACKS}


def _mixture(mlp: MoE) -> Parts:
    config = mlp.gate.config
    parts: Parts = {name[:-5]: matrix_of(mlp.experts, name) for name in STACKS}
    parts |= {"router": matrix_of(mlp.gate.weight)}
    parts |= _dense(mlp.shared_experts) if mlp.shared_experts is not None else {}
    bias = mlp.gate.e_score_correction_bias
    if bias is not None:
        parts["bias"] = matrix_of(bias[None]) if bias.dtype == torch.float32 else None
    best = (2 if config.topk_method == "noaux_tc" else 1) if is_group_limited(config) else 0
    return parts | {
        "E": config.n_routed_experts,
        "K": config.num_experts_per_tok,
        "G": config.n_group,
        "kept_groups": config.topk_group,
        "best_of_group": best,
        "sigmoid": config.scoring_func == "sigmoid",
        "normalise": config.norm_topk_prob,
        "routed_scale": config.routed_scaling_factor,
    }
