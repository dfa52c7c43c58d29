"""Every tensor of a Hugging Face checkpoint, and which of our parameters it holds.

A parameter bears the same name and shape on both sides, but for these exceptions:

  ours                                    theirs
  {layer}.mlp.experts.gate_proj           {layer}.mlp.experts.{e}.gate_proj.weight, one for each expert (also up, down)
  {layer}.self_attn.k_up and v_up         {layer}.self_attn.kv_b_proj.weight, each head's N rows before its U rows
  mtp.{i}.block.*                         model.layers.{num_hidden_layers + i}.*
  mtp.{i}.enorm, hnorm, eh_proj .weight   model.layers.{num_hidden_layers + i}.enorm, hnorm, eh_proj .weight
  mtp.{i}.norm.weight                     model.layers.{num_hidden_layers + i}.shared_head.norm.weight
  (the embedding and head, once more)     model.layers.{num_hidden_layers + i}.embed_tokens, shared_head.head .weight

Letters: H heads, N width without position, U value width, C latent width, E experts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import Parameter, parameters
from cavelight.weights.files import abbreviated

# What other engines expect beside each MTP module, and our modules share with the trunk.
MTP_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
# Old checkpoints carry these; they follow from rope_theta.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One tensor of a checkpoint, and the parameters of ours that it holds: all of one, one expert's, or two joined.

    `is_copy` marks the MTP layer's copies of embedding and head: written, and on reading only compared.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Parameter, ...]
    expert: int | None = None
    is_copy: bool = False

    @property
    def dtype(self) -> Literal["model", "float32"]:
        """The model's, or float32 whatever the model's is."""
        return self.parts[0].dtype

    def pack(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the checkpoint stores it, `shape`: a view of our parameter, or new where two are joined."""
        slots = self._slots(ours)
        if len(slots) == 1:
            return slots[0]
        theirs = slots[0].new_empty(self.shape)
        for window, slot in zip(self._windows(theirs), slots, strict=True):
            window.copy_(slot)
        return theirs

    def unpack(self, theirs: Tensor, ours: Mapping[str, Tensor]) -> None:
        """Copy the checkpoint's tensor into its place among our parameters, which keep their dtype.

        Of a copy nothing is taken: UserError unless it equals its original, which must be in place already.
        """
        if self.is_copy:
            self._compare(theirs, ours[self.parts[0].name])
            return
        for window, slot in zip(self._windows(theirs), self._slots(ours), strict=True):
            slot.copy_(window)

    def _slots(self, ours: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of our parameters, in the order in which this tensor holds them."""
        return [ours[part.name] if self.expert is None else ours[part.name][self.expert] for part in self.parts]

    def _windows(self, theirs: Tensor) -> Sequence[Tensor]:
        """Views of the checkpoint's tensor, one for each slot: kv_b_proj seen as [H, N+U, C] and split on axis 1."""
        if len(self.parts) == 1:
            return [theirs]
        heads, rows = self.parts[0].shape[0], [part.shape[1] for part in self.parts]
        return theirs.reshape(heads, sum(rows), -1).split_with_sizes(rows, dim=1)

    def _compare(self, theirs: Tensor, original: Tensor) -> None:
        theirs = theirs.to(original.dtype)
        if torch.equal(theirs, original):
            return
        different = int(((theirs != original) & ~(theirs.isnan() & original.isnan())).sum())
        if different:
            raise UserError(
                f"{self.name} is not a copy of {self.parts[0].name}",
                got=f"{different:,} of {original.numel():,} elements differ",
                why="prediction modules share embedding and head with the trunk, here as in the V3 report",
                do="read the checkpoint without its MTP modules (without_mtp=True, or --without-mtp)",
            )


def hf_tensors(config: ModelConfig) -> tuple[HFTensor, ...]:
    """Every tensor of the model's checkpoint, in the order of our shape table, MTP's copies last."""
    table = {parameter.name: parameter for parameter in parameters(config)}
    tensors = [tensor for parameter in table.values() for tensor in _tensors_of(parameter, table, config)]
    for layer in range(config.num_hidden_layers, config.num_layers_with_mtp):
        for name, original in MTP_COPIES.items():
            part = table[original]
            tensors.append(HFTensor(f"model.layers.{layer}.{name}", part.shape, (part,), is_copy=True))
    return tuple(tensors)


def _tensors_of(parameter: Parameter, table: Mapping[str, Parameter], config: ModelConfig) -> Iterable[HFTensor]:
    name, shape = _hf_name(parameter.name, config), parameter.shape
    stem, _, last = name.rpartition(".")
    if parameter.role == "expert":
        return [HFTensor(f"{stem}.{e}.{last}.weight", shape[1:], (parameter,), expert=e) for e in range(shape[0])]
    if last == "k_up":
        v_up = table[parameter.name.removesuffix("k_up") + "v_up"]
        (H, N, C), U = shape, v_up.shape[1]
        return [HFTensor(f"{stem}.kv_b_proj.weight", (H * (N + U), C), (parameter, v_up))]
    if last == "v_up":  # went with k_up
        return []
    return [HFTensor(name, shape, (parameter,))]


def _hf_name(name: str, config: ModelConfig) -> str:
    """Our MTP modules are their layers past the last; every other name is the same so far."""
    if not name.startswith("mtp."):
        return name
    _, module, rest = name.split(".", 2)
    rest = "shared_head.norm.weight" if rest == "norm.weight" else rest.removeprefix("block.")
    return f"model.layers.{config.num_hidden_layers + int(module)}.{rest}"


def by_parameter(tensors: Iterable[HFTensor]) -> dict[str, list[HFTensor]]:
    """The tensors of each of our parameters, experts in their order; without copies, and what two share a tensor of."""
    found: dict[str, list[HFTensor]] = {}
    for tensor in tensors:
        if len(tensor.parts) == 1 and not tensor.is_copy:
            found.setdefault(tensor.parts[0].name, []).append(tensor)
    return found


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint's tensor belongs to an MTP module: to a layer past the last."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= config.num_hidden_layers


@torch.no_grad()
def load_hf_dict(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model from a checkpoint's tensors by name, each cast to the parameter's dtype.

    Strict: UserError that lists every missing, left-over and misshapen tensor.
    """
    wanted, ours = hf_tensors(model.config), model.state_dict()
    check_fit(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, model.config)
    for tensor in wanted:
        if tensor.name in tensors:
            tensor.unpack(tensors[tensor.name], ours)


def check_fit(wanted: Sequence[HFTensor], found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Hold a checkpoint's names and shapes against what its configuration asks for, and raise one UserError for all.

    MTP's copies may be absent, as they say nothing that the originals do not; derived tensors may be present.
    """
    shapes = {tensor.name: tensor.shape for tensor in wanted}
    missing = [tensor.name for tensor in wanted if tensor.name not in found and not tensor.is_copy]
    left_over = [name for name in found if name not in shapes and not DERIVED.fullmatch(name)]
    misshapen = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in shapes.items()
        if found.get(name, shape) != shape
    ]
    if missing or left_over or misshapen:
        lists = (("missing", missing), ("left over", left_over), ("of another shape", misshapen))
        raise UserError(
            "The weights are not those of the model that config.json describes",
            got="; ".join(f"{len(names):,} {kind} ({abbreviated(names)})" for kind, names in lists if names),
            why="a model with a part missing or a tensor unused would run and be wrong",
            do=_advice(missing, left_over, misshapen, config),
        )


def _advice(missing: Sequence[str], left_over: Sequence[str], misshapen: Sequence[str], config: ModelConfig) -> str:
    modules = config.num_nextn_predict_layers
    if not misshapen and not left_over and all(is_mtp(name, config) for name in missing):
        return (
            f"config.json announces MTP modules (num_nextn_predict_layers is {modules}) that are not in the "
            "checkpoint, or not whole; transformers for one drops them when it saves: read it without them "
            "(without_mtp=True, or --without-mtp)"
        )
    if not misshapen and not missing and all(is_mtp(name, config) for name in left_over):
        return (
            "the checkpoint holds more MTP modules than config.json announces (num_nextn_predict_layers is "
            f"{modules}): correct that number, or read the checkpoint without them (without_mtp=True, or --without-mtp)"
        )
    return "check that config.json and weights belong together and that the download is complete"
