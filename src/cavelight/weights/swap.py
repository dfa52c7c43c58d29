"""Running a model from packed weights: its Linears and its stacked experts exchanged for ones that hold them packed.

Which are exchanged follows from their role in the shape table; the model is not told. What a product needs is unpacked
for it a few rows, or one expert, at a time and forgotten. For running only: what is packed has no gradient.

Letters: T tokens, K experts a token, I inputs and O outputs of a Linear, D hidden size, F expert width, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cavelight.errors import UserError
from cavelight.kernels import experts, native
from cavelight.model.transformer import Transformer
from cavelight.spec.formats import PACKED_ROLES, Format
from cavelight.spec.shapes import parameters
from cavelight.weights.names import HFTensor, by_parameter
from cavelight.weights.quant import tiles_of, unpack, unpack_tile
from cavelight.weights.stored import Checkpoint

TILE = 1 << 20  # elements of a Linear that are unpacked at a time
STACKS = ("gate_proj", "up_proj", "down_proj")


class Packed(nn.Module):
    """Holds parts of packed matrices as buffers, in the dtypes in which they are stored."""

    def __init__(self, parts: Mapping[str, Tensor], format: Format) -> None:
        super().__init__()
        self.format = format
        for name, part in parts.items():
            self.register_buffer(name, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`model.to(float32)` and the like move what is packed, but cannot cast it."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, after in list(self.named_buffers()):
            if after.dtype != before[name].dtype:
                setattr(self, name, before[name].to(after.device))
        return self


class PackedLinear(Packed):
    """y = x Wᵀ, with W [O, I] packed; `parts` as weights.quant.pack gives them."""

    def __init__(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> None:
        super().__init__({suffix: part for suffix, part in parts.items() if suffix != "weight_shape"}, format)
        self.out_features, self.in_features = shape

    def forward(self, x_TI: Tensor) -> Tensor:
        _refuse_gradients(x_TI)
        parts, columns = dict(self.named_buffers()), self.in_features
        y_TO = x_TI.new_empty(*x_TI.shape[:-1], self.out_features)
        for rows in tiles_of(self.out_features, columns, self.format, TILE):
            y_TO[..., rows] = F.linear(x_TI, unpack_tile(parts, self.format, rows, columns).to(x_TI.dtype))
        return y_TO

    def matrix_as_stored(self, name: str = "") -> native.Matrix | None:
        """See kernels.native.KeepsMatrix."""
        if self.format.kind != "int":
            return None
        words, scale = self.get_buffer("weight_packed"), self.get_buffer("weight_scale")
        return native.packed_matrix(words, scale, self.format.bits, self.format.group, self.in_features)


class PackedExperts(Packed):
    """A layer's routed experts, gate and up [E, F, D] and down [E, D, F], packed; `parts` by stack and suffix."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]], format: Format, hidden: int, width: int) -> None:
        super().__init__(
            {f"{stack}_{suffix}": part for stack in parts for suffix, part in parts[stack].items()}, format
        )
        self.suffixes = tuple(parts["gate_proj"])
        self.columns = {"gate_proj": hidden, "up_proj": hidden, "down_proj": width}

    def matrix(self, stack: str, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix of a stack, unpacked."""
        parts = {suffix: self.get_buffer(f"{stack}_{suffix}")[expert] for suffix in self.suffixes}
        return unpack(parts, self.format, dtype, self.columns[stack])

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over each token's experts, [T, D], as kernels.experts.plain defines it."""
        _refuse_gradients(x_TD)
        return experts.streamed(
            x_TD,
            ids_TK,
            weights_TK,
            self.get_buffer(f"{STACKS[0]}_{self.suffixes[0]}").shape[0],
            lambda expert: [self.matrix(stack, expert, x_TD.dtype) for stack in STACKS],
        )

    def matrix_as_stored(self, name: str = "") -> native.Matrix | None:
        """Of the stack `name`; see kernels.native.KeepsMatrix."""
        if self.format.kind != "int":
            return None
        words, scale = (self.get_buffer(f"{name}_weight_{part}") for part in ("packed", "scale"))
        return native.packed_matrix(words, scale, self.format.bits, self.format.group, self.columns[name])


def is_packed(model: nn.Module) -> bool:
    """Whether any of the model's matrices are kept packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def swap(model: Transformer, checkpoint: Checkpoint, wanted: Sequence[HFTensor], mapped: bool = False) -> set[str]:
    """Exchange what can be run from packed weights, and fill it from the checkpoint's tensors, `wanted`.

    mapped: as they lie in their files, where they do. Returns the names of the parameters that went. A stack of experts
    stays plain if only some of it is packed, and so do the two up-projections of latent attention, which are no
    Linears.
    """
    packed = _packed_alike(checkpoint, wanted)
    table = {p.name: p for p in parameters(model.config) if p.name in packed and p.role in PACKED_ROLES}
    gone = set()

    def matrices(name: str) -> dict[str, Tensor]:
        return checkpoint.packed_stack([tensor.name for tensor in packed[name]], mapped)

    for name, p in table.items():
        module, _, last = name.rpartition(".")
        stacks = [f"{module}.{stack}" for stack in STACKS] if p.role == "expert" else [name]
        if last not in ("weight", STACKS[0]) or not table.keys() >= set(stacks):
            continue
        if p.role == "expert":
            parts = {stack.rpartition(".")[2]: matrices(stack) for stack in stacks}
            _exchange(model, module, PackedExperts(parts, checkpoint.format, p.shape[2], p.shape[1]))
        else:
            alone = {suffix: part[0] for suffix, part in matrices(name).items()}
            _exchange(model, module, PackedLinear(alone, checkpoint.format, (p.shape[0], p.shape[1])))
        gone |= set(stacks)
    if gone:
        model.requires_grad_(False)
    return gone


def _packed_alike(checkpoint: Checkpoint, tensors: Sequence[HFTensor]) -> dict[str, list[HFTensor]]:
    """The tensors of each of our parameters that is packed throughout, in the same dtypes."""

    def dtypes(tensor: HFTensor) -> tuple[torch.dtype, ...]:
        return tuple(checkpoint.files.entries[part].dtype for part in checkpoint.parts(tensor.name).values())

    return {
        name: parts
        for name, parts in by_parameter(tensors).items()
        if all(checkpoint.is_packed(tensor.name) for tensor in parts) and len({dtypes(tensor) for tensor in parts}) == 1
    }


def _exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _refuse_gradients(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError(
            "A model with packed weights cannot be trained",
            why="what is packed has no gradient",
            do="load it with packed=False, or convert the checkpoint with `cavelight convert --to hf`",
        )
