"""A model as it is run: weights in the numbers they are stored in, all arithmetic in float32, layers in one piece.

Letters: T tokens, D hidden size, I inputs and O outputs of a Linear, E experts.

`quick` makes a second view of a model: the same parameters, other modules around them. Steps of a few tokens go through
kernels.native, which reads every weight once as it lies. More tokens, and everything on a machine without a compiler,
go through the plain modules, for which a matrix is widened to float32 a part at a time.
"""

import copy
from ctypes import CDLL
from types import MethodType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cavelight.disk import cache_folder
from cavelight.kernels import experts, native
from cavelight.kernels.native.build import Build
from cavelight.model.block import Block
from cavelight.model.gqa import GQA
from cavelight.model.layers import Linear, RMSNorm, SwiGLU
from cavelight.model.mla import MLA
from cavelight.model.moe import Experts, MoE
from cavelight.model.mtp import MTPModule
from cavelight.model.ports import Attend, Dispatch, GroupedDispatch
from cavelight.model.router import Router, Routing
from cavelight.model.transformer import Transformer, Trunk
from cavelight.run.cache import CachedAttend
from cavelight.run.invariant import DispatchAlone, RowBlocks
from cavelight.run.layout import STACKS, chain_of, matrix_of
from cavelight.run.paged import PagedAttend
from cavelight.spec.shapes import parameters

BUILD = Build("step.cpp", cache_folder)
FEW = 32  # tokens of a step up to which layers are computed in one piece
TILE = 1 << 20  # elements of a matrix that are widened at a time
OURS = {Transformer, Trunk, MTPModule, Block, MLA, GQA, MoE, SwiGLU, Router, Experts, RMSNorm, Linear}
OURS |= {nn.Embedding, nn.ModuleList}
_made: WeakKeyDictionary[Transformer, tuple[Transformer, tuple[object, ...]]] = WeakKeyDictionary()


def quick(model: Transformer) -> Transformer:
    """The model to run in place of `model`: itself where that is none in float32 or bfloat16 on a CPU, has shapes other
    than its configuration says, or foreign modules, methods or hooks inside, which a view would go past.

    Parameters are shared: what changes them in place is seen. If they moved, a new view is made when next asked for.
    """
    weight = model.lm_head.weight
    if type(model) is not Transformer or not all(map(_is_plain, model.modules())):
        return model
    if weight.device.type != "cpu" or weight.dtype not in native.KINDS:
        return model
    made, state = _made.get(model), _state(model)
    if made is None or made[1] != state:
        if not _is_in_shape(model):
            return model
        view = _view(model)
        assert isinstance(view, Transformer)
        made = _made[model] = view, state
    return made[0]


def why_plain(model: Transformer, dispatch: Dispatch) -> str | None:
    """Why a step of up to FEW tokens is not all native here and now; None if it is, whatever comes later.

    A token's logits are then the same to the bit in any such step. `model`: what `quick` made.
    """
    trunk, head = model.model, model.lm_head
    whole = isinstance(trunk, QuickTrunk) and trunk.chain is not None and isinstance(head, QuickLinear)
    if not (whole and head.matrix is not None and _at_home(dispatch)):
        return "they do not compute all parts of a model like this one"
    return without_native(wait=False)


def _at_home(dispatch: Dispatch) -> bool:
    return type(dispatch) in (GroupedDispatch, DispatchAlone)


def _is_plain(module: nn.Module) -> bool:
    known = type(module) in OURS or isinstance(module, native.KeepsMatrix)
    own = all(_wraps_its_class(module, name) for name in _own_methods(module))
    return known and own and not module._forward_hooks and not module._forward_pre_hooks


def _own_methods(module: nn.Module) -> list[str]:
    """Names of methods that were put on a module itself and come before its class's."""
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def _wraps_its_class(module: nn.Module, name: str) -> bool:
    """Whether such a method is the class's, wrapped for training (train.recompute)."""
    return getattr(vars(module)[name], "__wrapped__", None) == MethodType(getattr(type(module), name), module)


def _is_in_shape(model: Transformer) -> bool:
    """Native code does not look: it would read past the end of an expert that was taken out."""
    shapes = {p.name: p.shape for p in parameters(model.config)}
    return all(shapes.get(name, tensor.shape) == tensor.shape for name, tensor in model.state_dict().items())


def _state(model: Transformer) -> tuple[object, ...]:
    """What a view is true for: modules, where tensors lie, and the versions of those that it holds copies of."""
    tensors = model.state_dict().values()
    copied = [t._version for t in tensors if t.dtype == torch.float16 and not t.is_inference()]
    return (
        *(id(module) for module in model.modules()),
        *(tensor.data_ptr() for tensor in tensors),
        *copied,
        id(model.config),
        id(model.rotary),
    )


def without_native(wait: bool = True) -> str | None:
    """Why kernels.native cannot be used, None if it can: once it is built, or as it is without waiting for that."""
    return None if BUILD.get(wait) else BUILD.why_not() or "they are still being built, for the next run"


def _view(module: nn.Module) -> nn.Module:
    """The same module with others inside."""
    if isinstance(module, nn.Embedding):
        return QuickEmbedding(module)
    if isinstance(module, Experts):
        return QuickExperts(module)
    if isinstance(module, Linear) or (isinstance(module, native.KeepsMatrix) and hasattr(module, "in_features")):
        return QuickLinear(module)
    made = copy.copy(module)
    for name in _own_methods(module):  # bound to `module`, and would lead back to it
        del made.__dict__[name]
    made._modules = {name: child and _view(child) for name, child in module._modules.items()}
    if isinstance(made, Block | Trunk):
        assert isinstance(module, Block | Trunk)
        made.__class__ = QuickBlock if isinstance(made, Block) else QuickTrunk
        made.__dict__["chain"] = chain_of([module] if isinstance(module, Block) else [*module.layers])
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
        self.matrix = matrix_of(inner)

    @property
    def weight(self) -> Tensor:
        """Of a plain one."""
        weight = self.inner.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x_TI: Tensor) -> Tensor:
        few = x_TI.ndim == 2 and (len(x_TI) <= FEW or RowBlocks.entered.get())
        library = BUILD.get() if self.matrix is not None and few and not x_TI.requires_grad else None
        if library and self.matrix is not None:
            return native.product(library, self.matrix, x_TI)
        if not isinstance(self.inner, nn.Linear) or self.weight.dtype == x_TI.dtype:
            y_TO: Tensor = self.inner(x_TI)
            return y_TO
        rows = max(1, TILE // self.weight.shape[1])
        return torch.cat([F.linear(x_TI, some.to(x_TI.dtype)) for some in self.weight.split(rows)], dim=-1)


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

    chain: native.Chain | None

    def forward(
        self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, Routing | None]:
        library = _library(self.chain, attend, dispatch, x_TD)
        if library is None or self.chain is None:
            return super().forward(x_TD, cos_sin, attend, dispatch)
        y_TD, routings = _in_one_piece(library, self.chain, x_TD, cos_sin, attend)
        return y_TD, routings[0] if routings else None


class QuickTrunk(Trunk):
    """All layers in one piece where they can."""

    chain: native.Chain | None

    def forward(
        self, tokens_T: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, list[Routing]]:
        library = _library(self.chain, attend, dispatch, tokens_T)
        if library is None or self.chain is None:
            return super().forward(tokens_T, cos_sin, attend, dispatch)
        return _in_one_piece(library, self.chain, self.embed_tokens(tokens_T), cos_sin, attend)


def _library(chain: native.Chain | None, attend: Attend, dispatch: Dispatch, tokens: Tensor) -> CDLL | None:
    """What computes layers in one piece: for few tokens, rows in a cache of ours, and all experts at home.

    A port that only is derived from one of ours wants to be called.
    """
    if chain is None or not _at_home(dispatch) or tokens.requires_grad:
        return None
    few = len(tokens) <= FEW
    if type(attend) is PagedAttend:
        few, rows = few or attend.alone, attend.cache.rows_MZW
    elif type(attend) is CachedAttend and attend.form is None:
        rows = attend.cache.rows_MSW
    else:
        return None
    return BUILD.get() if few and rows.dtype in native.ROW_KINDS and rows.device.type == "cpu" else None


def _in_one_piece(
    library: CDLL,
    chain: native.Chain,
    x_TD: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    attend: Attend,
) -> tuple[Tensor, list[Routing]]:
    """What the layers make of some tokens; of many, a few at a time: each has sums of its own while it looks back."""
    assert isinstance(attend, CachedAttend | PagedAttend)
    rows_MZW, places = attend.rows(len(x_TD))
    rows_MZW = rows_MZW[chain.first : chain.first + chain.count]
    if len(x_TD) <= FEW:
        y_TD, routed = native.layers(library, chain, x_TD, cos_sin, rows_MZW, places)
        return y_TD, [Routing(*of_layer) for of_layer in routed]
    made = []
    for start in range(0, len(x_TD), FEW):
        end = min(start + FEW, len(x_TD))
        few = [t[start:end] for t in (x_TD, *cos_sin)]
        made.append(native.layers(library, chain, few[0], (few[1], few[2]), rows_MZW, places.part(start, end)))
    by_layer = zip(*(routed for _, routed in made), strict=True)
    routings = [Routing(*map(torch.cat, zip(*of_layer, strict=True))) for of_layer in by_layer]
    return torch.cat([y_TD for y_TD, _ in made]), routings
