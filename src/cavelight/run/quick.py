"""A model as it is run: weights in the numbers they are stored in, all arithmetic in float32, layers in one piece.

Letters: T tokens, D hidden size, I inputs and O outputs of a Linear, E experts.

`quick` makes a second view of a model: the same parameters, other modules around them. Steps of a few tokens go layer
by layer through kernels.native, which reads every weight once as it lies. More tokens, and everything on a machine
without a compiler, go through the plain modules, for which a matrix is widened to float32 a part at a time.
"""

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cavelight.disk import cache_folder
from cavelight.kernels import experts, native
from cavelight.kernels.native.build import Build
from cavelight.model.block import Block
from cavelight.model.layers import SwiGLU
from cavelight.model.mla import LATENT_NORM_EPS, MLA
from cavelight.model.moe import Experts, MoE
from cavelight.model.ports import Attend, Dispatch, GroupedDispatch
from cavelight.model.router import Routing, is_group_limited
from cavelight.model.transformer import Transformer, Trunk
from cavelight.run.cache import CachedAttend
from cavelight.run.invariant import DispatchAlone
from cavelight.run.paged import PagedAttend

BUILD = Build("step.cpp", cache_folder)
FEW = 32  # tokens of a step up to which a layer is computed in one piece
TILE = 1 << 20  # elements of a matrix that are widened at a time
STACKS = ("gate_proj", "up_proj", "down_proj")
_made: WeakKeyDictionary[Transformer, tuple[Transformer, tuple[int, ...]]] = WeakKeyDictionary()


def quick(model: Transformer) -> Transformer:
    """The model to run in place of `model`: the same one where float32 is not what it computes in, or not on a CPU.

    Parameters are shared, so that training goes on being seen, as long as it changes them in place.
    """
    weight = model.lm_head.weight
    if weight.device.type != "cpu" or weight.dtype not in native.KINDS:
        return model
    places = tuple(tensor.data_ptr() for tensor in model.state_dict().values())
    made, then = _made.get(model, (None, None))
    if made is None or then != places:
        made = _view(model)
        assert isinstance(made, Transformer)
        _made[model] = made, places
    return made


def _view(module: nn.Module) -> nn.Module:
    """The same module with others inside."""
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
        return QuickLinear(module)
    if isinstance(module, nn.Embedding):
        return QuickEmbedding(module)
    if isinstance(module, Experts):
        return QuickExperts(module)
    made = copy.copy(module)
    made._modules = {name: child and _view(child) for name, child in module._modules.items()}
    if type(made) in QUICK:
        made.__class__ = QUICK[type(made)]
    return made


class QuickEmbedding(nn.Module):
    """Rows of an embedding, widened."""

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens_T: Tensor) -> Tensor:
        rows_TD: Tensor = self.inner(tokens_T)
        return rows_TD.float()


class QuickLinear(nn.Module):
    """y = x Wᵀ in float32, whatever `inner` stores W in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.matrix = _matrix(inner)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x_TI: Tensor) -> Tensor:
        library = BUILD.library() if self.matrix and x_TI.shape[0] <= FEW else None
        if library and self.matrix and not x_TI.requires_grad:
            return native.product(library, self.matrix, x_TI)
        weight_OI = getattr(self.inner, "weight", None)
        if weight_OI is None or weight_OI.dtype == x_TI.dtype:
            y_TO: Tensor = self.inner(x_TI)
            return y_TO
        rows = max(1, TILE // weight_OI.shape[1])
        return torch.cat([F.linear(x_TI, some.to(x_TI.dtype)) for some in weight_OI.split(rows)], dim=-1)


class QuickExperts(nn.Module):
    """As `Experts`, in float32."""

    def __init__(self, inner: Experts) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        stacks = [getattr(self.inner, name) for name in STACKS]
        if stacks[0].dtype == x_TD.dtype:
            return experts.grouped(x_TD, ids_TK, weights_TK, *stacks)
        return experts.streamed(
            x_TD, ids_TK, weights_TK, len(stacks[0]), lambda e: [stack[e].to(x_TD.dtype) for stack in stacks]
        )


class QuickBlock(Block):
    """A layer that goes in one piece where it can."""

    def forward(
        self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, Routing | None]:
        made = _in_one_piece([self], x_TD, cos_sin, attend, dispatch)
        if made is None:
            return super().forward(x_TD, cos_sin, attend, dispatch)
        return made[0], made[1][0] if made[1] else None


class QuickTrunk(Trunk):
    """All layers in one piece where they can."""

    def forward(
        self, tokens_T: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, list[Routing]]:
        made = None
        if _may(attend, dispatch, len(tokens_T)):
            made = _in_one_piece(self.layers, self.embed_tokens(tokens_T), cos_sin, attend, dispatch)
        return super().forward(tokens_T, cos_sin, attend, dispatch) if made is None else made


def _in_one_piece(
    blocks: Sequence[QuickBlock], x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
) -> tuple[Tensor, list[Routing]] | None:
    """What blocks that follow one another make of few tokens; None if only the plain modules can."""
    library = BUILD.library() if _may(attend, dispatch, x_TD.shape[0]) and not x_TD.requires_grad else None
    chain = _chain(blocks) if library else None
    if not library or not chain:
        return None
    assert isinstance(attend, CachedAttend | PagedAttend)
    rows_MZL, places = attend.rows(x_TD.shape[0])
    first = blocks[0].layer
    y_TD, routed = native.layers(library, chain, x_TD, cos_sin, rows_MZL[first : first + len(blocks)], places)
    return y_TD, [Routing(*of_layer) for of_layer in routed]


def _may(attend: Attend, dispatch: Dispatch, T: int) -> bool:
    """Few tokens, rows in a cache of ours, all experts at home."""
    if not isinstance(dispatch, GroupedDispatch | DispatchAlone):
        return False
    if isinstance(attend, PagedAttend):
        return T <= FEW or attend.alone
    return isinstance(attend, CachedAttend) and attend.form is None and T <= FEW


def _chain(blocks: Sequence[QuickBlock]) -> native.Chain | None:
    """Where everything of these blocks lies; None if some is stored in a way that only the plain modules read."""
    head = blocks[0]
    if "chain" not in head.__dict__ or head.chain_length != len(blocks):
        layers = [_layer(block) for block in blocks]
        head.chain_length = len(blocks)
        head.chain = None if None in layers else native.Chain(layers)
    return head.chain


def _layer(block: QuickBlock) -> native.Layer | None:
    """A description of a block for kernels.native."""
    attention = block.self_attn
    if not isinstance(attention, MLA):
        return None
    config = attention.config
    low_rank = config.q_lora_rank is not None
    parts: dict[str, Any] = {
        "query_up": _matrix(attention.q_b_proj if low_rank else attention.q_proj),
        "latent_down": _matrix(attention.kv_a_proj_with_mqa),
        "key_up": _matrix(attention.k_up),
        "value_up": _matrix(attention.v_up),
        "output": _matrix(attention.o_proj),
    }
    parts |= {"query_down": _matrix(attention.q_a_proj)} if low_rank else {}
    parts |= _mixture(block.mlp) if isinstance(block.mlp, MoE) else _dense(block.mlp)
    norms = {
        "attention_norm": block.input_layernorm.weight,
        "latent_norm": attention.kv_a_layernorm.weight,
        "ffn_norm": block.post_attention_layernorm.weight,
    }
    norms |= {"query_norm": attention.q_a_layernorm.weight} if low_rank else {}
    bias = block.mlp.gate.e_score_correction_bias if isinstance(block.mlp, MoE) else None
    norms |= {"bias": bias} if bias is not None else {}
    if any(part is None for part in parts.values()) or config.kv_lora_rank % 16:
        return None
    floats = {name: weight.float().contiguous() for name, weight in norms.items()}
    layer = native.Layer(
        D=config.hidden_size,
        H=config.num_attention_heads,
        N=config.qk_nope_head_dim,
        R=config.qk_rope_head_dim,
        C=config.kv_lora_rank,
        U=config.v_head_dim,
        low_rank_query=low_rank,
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        softmax_scale=attention.scale,
        **{name: weight.data_ptr() for name, weight in floats.items()},
        **parts,
    )
    layer.tensors = (*floats.values(), *parts.values())
    return layer


def _dense(mlp: SwiGLU) -> dict[str, Any]:
    return {"shared": 1} | {f"shared_{name[:-5]}": _matrix(getattr(mlp, name)) for name in STACKS}


def _mixture(mlp: MoE) -> dict[str, Any]:
    router = mlp.gate
    config = router.config
    parts = {name[:-5]: _stack(mlp.experts, name) for name in STACKS} | {"router": _matrix(router.weight)}
    parts |= _dense(mlp.shared_experts) if mlp.shared_experts is not None else {}
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


def _matrix(of: nn.Module | Tensor) -> native.Matrix | None:
    """A matrix where it lies, of a Linear, of a packed one (weights.swap) or as it is."""
    if isinstance(of, QuickLinear):
        return of.matrix
    weight = of if isinstance(of, Tensor) else getattr(of, "weight", None)
    if isinstance(of, nn.Linear | Tensor) and isinstance(weight, Tensor):
        return native.matrix(weight)
    format = of.format
    if format.kind != "int":
        return None
    return native.packed_matrix(of.weight_packed, of.weight_scale, format.bits, format.group, of.in_features)


def _stack(of: nn.Module, name: str) -> native.Matrix | None:
    if isinstance(of, QuickExperts):
        return native.matrix(getattr(of.inner, name))
    if of.format.kind != "int":
        return None
    parts = (getattr(of, f"{name}_weight_{part}") for part in ("packed", "scale"))
    return native.packed_matrix(*parts, of.format.bits, of.format.group, of.columns[name])


QUICK: dict[type[nn.Module], type[nn.Module]] = {Block: QuickBlock, Trunk: QuickTrunk}
