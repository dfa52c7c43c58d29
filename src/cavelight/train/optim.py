"""Initialisation by role; AdamW, or Muon and AdamW, on float32 masters."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cavelight.model.transformer import Transformer
from cavelight.spec.sections import TrainSection
from cavelight.spec.shapes import Parameter, parameters
from cavelight.train.adamw import AdamW
from cavelight.train.muon import Muon

MATRICES = {"attention", "dense", "expert", "shared_expert", "mtp_projection"}  # roles that Muon takes


@torch.no_grad()
def initialise(model: Transformer, std: float, seed: int, stds: Mapping[str, float] | None = None) -> None:
    """Normal with the same deviation for every matrix, ones for norms, zero for routing biases (V3 report, 4.2).

    `stds` gives roles of the shape table a deviation of their own. Drawn in float32 in the table's order, so that a
    seed means the same model in every dtype.
    """
    generator, stds = torch.Generator().manual_seed(seed), stds or {}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for parameter in parameters(model.config):
        tensor = tensors[parameter.name]
        if parameter.role == "norm":
            tensor.fill_(1.0)
        elif parameter.role == "routing_bias":
            tensor.zero_()
        else:
            tensor.copy_(torch.randn(parameter.shape, generator=generator) * stds.get(parameter.role, std))


class Optimizer:
    """Keeps float32 masters where the model's weights are narrower, sums gradients in float32, and updates by AdamW.

    Norms alone are exempt from weight decay: a gain has its neutral value at one, and pulling it towards zero is no
    regularisation. The report names no exception, so embedding, head and gate decay like any matrix; embedding and
    head at the same speed whatever their own rates are. With `optimizer = "muon"` the matrices inside the layers and
    the MTP projections are Muon's; embedding, head, gates and norms, which are no maps between features or have rows
    that meet a gradient now and then, remain AdamW's. What no loss reaches (MTP modules while lambda is 0) stays as it
    is: old momentum would go on moving it, and decay shrink it.
    """

    def __init__(self, model: Transformer, recipe: TrainSection) -> None:
        table = {parameter.name: parameter for parameter in parameters(model.config)}
        self.weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.masters = {
            name: weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for name, weight in self.weights.items()
        }
        groups: dict[str, list[nn.Parameter]] = {"norm": [], "embedding": [], "head": [], "others": []}
        matrices: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            role = table[name].role
            if recipe.optimizer == "muon" and role in MATRICES:
                matrices[name] = _as_matrices(table[name], master.detach())
            else:
                groups[role if role in groups else "others"].append(master)
        self.table, self.weight_decay = table, recipe.weight_decay
        self.factors = [1.0, recipe.embedding_rate, recipe.head_rate, 1.0]
        self.decays = [0.0, *(recipe.weight_decay / factor for factor in self.factors[1:])]
        self.adamw = AdamW(groups.values(), (recipe.beta1, recipe.beta2), pick_dtype(recipe.moments))
        self.muon = Muon(matrices, pick_dtype("auto"))

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add a micro-batch's gradients, in the order of the model's parameters, None for what its loss does not reach.

        They are the optimizer's from now.
        """
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            if gradient is None:
                continue
            # torch's fused AdamW reads memory in order, whatever the strides
            master.grad = gradient.float().contiguous() if master.grad is None else master.grad.add_(gradient)

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients that were added, a scalar; not finite if any of them is not."""
        return nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])

    @torch.no_grad()
    def step(self, learning_rate: float, clip_norm: float, norm: Tensor) -> None:
        """Clip gradients of this norm to `clip_norm`, update the masters and from them the weights, forget the rest."""
        nn.utils.clip_grads_with_norm_(self.masters.values(), clip_norm, norm)
        self.adamw.step([learning_rate * factor for factor in self.factors], self.decays)
        reached = {name: grad for name in self.muon.matrices if (grad := self.masters[name].grad) is not None}
        gradients = {name: _as_matrices(self.table[name], gradient) for name, gradient in reached.items()}
        self.muon.step(gradients, learning_rate, self.weight_decay)
        self.forget()
        for name, weight in self.weights.items():
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    def forget(self) -> None:
        """Drop the gradients that were added."""
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, object]:
        """Everything but the recipe's settings. The tensors are the optimizer's own, not copies."""
        masters = {name: master.detach() for name, master in self.masters.items()}
        return {"adamw": self.adamw.state(), "muon": self.muon.state(), "masters": masters}

    @torch.no_grad()
    def load_state(self, state: dict[str, object]) -> None:
        """Go on from a `state` of the same model and the same kind of optimizer; the weights come with it."""
        adamw, muon, masters = state["adamw"], state["muon"], state["masters"]
        assert isinstance(adamw, dict) and isinstance(muon, dict) and isinstance(masters, dict)
        self.adamw.load_state(adamw)
        self.muon.load_state(muon)
        for name, master in self.masters.items():
            master.copy_(masters[name])
            self.weights[name].copy_(master)


def _as_matrices(parameter: Parameter, tensor: Tensor) -> Tensor:
    """What Muon takes for one matrix, or a stack of them: experts apart, the heads of an up-projection together."""
    return tensor.flatten(0, 1) if parameter.axes[0] == "H" else tensor


def pick_dtype(wanted: str) -> torch.dtype:
    """`auto`: bfloat16 where the machine multiplies it faster than float32, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32
