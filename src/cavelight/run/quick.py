"""A model as it is run: weights in the numbers they are stored in, all arithmetic in float32, layers in one piece.

Letters: T tokens, D hidden size, I inputs and O outputs of a Linear, E experts.

`quick` makes a second view of a model: the same parameters, other modules around them. Steps of a few tokens go through
kernels.native, which reads every weight once as it lies. More tokens, and everything on a machine without a compiler,
go through the plain modules, for which a matrix is widened to float32 a part at a time.
"""

import copy
from ctypes import CDLL
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cavelight.disk import cache_folder
from cavelight.kernels import experts, native
from cavelight.kernels.native.build import Build
from cavelight.model.block import Block
from cavelight.model.moe import Experts
from cavelight.model.ports import Attend, Dispatch, GroupedDispatch
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer, Trunk
from cavelight.run.cache import CachedAttend
from cavelight.run.invariant import DispatchAlone, RowBlocks
from cavelight.run.layout import STACKS, chain_of, matrix_of
from cavelight.run.paged import PagedAttend

BUILD = Build("step.cpp", cache_folder)
FEW = 32  # tokens of a step up to which layers are computed in one piece
TILE = 1 << 20  # elements of a matrix that are widened at a time
_made: WeakKeyDictionary[Transformer, tuple[Transformer, tuple[int, ...]]] = WeakKeyDictionary()


def quick(model: Transformer) -> Transformer:
    """The model to run in place of `model`: itself where that does not compute in float32, or not on a CPU.

    Parameters are shared: what changes them in place is seen, and if they moved a new view is made.
    """
    weight = model.lm_head.weight
    if type(model) is not Transformer or isinstance(model.model, QuickTrunk):
        return model
    if weight.device.type != "cpu" or weight.dtype not in native.KINDS:
        return model
    places = tuple(tensor.data_ptr() for tensor in model.state_dict().values())
    made = _made.get(model)
    if made is None or made[1] != places:
        view = _view(model)
        assert isinstance(view, Transformer)
        made = _made[model] = view, places
    return made[0]


def is_steady(model: Transformer, dispatch: Dispatch) -> bool:
    """Whether a token's logits are the same to the bit in any step of up to FEW tokens, now and later."""
    trunk, head = model.model, model.lm_head
    whole = isinstance(trunk, QuickTrunk) and trunk.chain is not None and isinstance(head, QuickLinear)
    return whole and head.matrix is not None and _at_home(dispatch) and BUILD.library() is not None


def _at_home(dispatch: Dispatch) -> bool:
    return isinstance(dispatch, GroupedDispatch | DispatchAlone)


def without_native() -> str | None:
    """Wait until kernels.native is built; why it cannot be used, if it cannot."""
    BUILD.library(wait=True)
    return BUILD.why_not()


def _view(module: nn.Module) -> nn.Module:
    """The same module with others inside."""
    if isinstance(module, nn.Embedding):
        return QuickEmbedding(module)
    if isinstance(module, Experts):
        return QuickExperts(module)
    if isinstance(module, nn.Linear) or (isinstance(module, native.KeepsMatrix) and hasattr(module, "in_features")):
        return QuickLinear(module)
    made = copy.copy(module)
    made._modules = {name: child and _view(child) for name, child in module._modules.items()}
    if isinstance(made, Block | Trunk):
        assert isinstance(module, Block | Trunk)
        made.__class__ = QuickBlock if isinstance(made, Block) else QuickTrunk
        blocks = [module] if isinstance(module, Block) else [b for b in module.layers if isinstance(b, Block)]
        made.__dict__["chain"] = chain_of(blocks)
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
        few = x_TI.shape[0] <= FEW or RowBlocks.entered.get()
        library = BUILD.library() if self.matrix is not None and few and not x_TI.requires_grad else None
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
        y_TD, routings = _in_one_piece(library, self.chain, self.layer, x_TD, cos_sin, attend)
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
        return _in_one_piece(library, self.chain, 0, self.embed_tokens(tokens_T), cos_sin, attend)


def _library(chain: native.Chain | None, attend: Attend, dispatch: Dispatch, tokens: Tensor) -> CDLL | None:
    """What computes layers in one piece: for few tokens, rows in a cache of ours, and all experts at home."""
    if chain is None or not _at_home(dispatch) or tokens.requires_grad:
        return None
    few = len(tokens) <= FEW
    if isinstance(attend, PagedAttend):
        return BUILD.library() if few or attend.alone else None
    return BUILD.library() if few and isinstance(attend, CachedAttend) and attend.form is None else None


def _in_one_piece(
    library: CDLL,
    chain: native.Chain,
    first: int,
    x_TD: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    attend: Attend,
) -> tuple[Tensor, list[Routing]]:
    """What layers from number `first` on make of some tokens."""
    assert isinstance(attend, CachedAttend | PagedAttend)
    rows_MZL, places = attend.rows(len(x_TD))
    y_TD, routed = native.layers(library, chain, x_TD, cos_sin, rows_MZL[first : first + chain.count], places)
    return y_TD, [Routing(*of_layer) for of_layer in routed]
