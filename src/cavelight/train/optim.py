"""Initialisation by role, AdamW on float32 masters, and the learning rate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cavelight.model.transformer import Transformer
from cavelight.spec.recipe import TrainSection
from cavelight.spec.shapes import parameters


@torch.no_grad()
def initialise(model: Transformer, std: float, seed: int) -> None:
    """Normal with the same deviation for every matrix, ones for norms, zero for routing biases (V3 report, 4.2).

    Drawn in float32 in the shape table's order, so that a seed means the same model in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for parameter in parameters(model.config):
        tensor = tensors[parameter.name]
        if parameter.role == "norm":
            tensor.fill_(1.0)
        elif parameter.role == "routing_bias":
            tensor.zero_()
        else:
            tensor.copy_(torch.randn(parameter.shape, generator=generator) * std)


class Optimizer:
    """AdamW that keeps float32 masters where the model's weights are narrower, and sums gradients in float32.

    Norms are exempt from weight decay: pulling a gain towards zero is no regularisation. Embedding and head may have
    rates of their own; they decay as the others do.
    """

    def __init__(self, model: Transformer, recipe: TrainSection) -> None:
        roles = {parameter.name: parameter.role for parameter in parameters(model.config)}
        self.weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.masters = {
            name: weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for name, weight in self.weights.items()
        }
        groups: dict[str, list[nn.Parameter]] = {"norm": [], "embedding": [], "head": [], "others": []}
        for name, master in self.masters.items():
            groups[roles[name] if roles[name] in groups else "others"].append(master)
        self.factors = [1.0, recipe.embedding_rate, recipe.head_rate, 1.0]
        decays = [0.0, *(recipe.weight_decay / factor for factor in self.factors[1:])]
        self.adamw = torch.optim.AdamW(
            [{"params": m, "weight_decay": decay} for m, decay in zip(groups.values(), decays, strict=True)],
            betas=(recipe.beta1, recipe.beta2),
            fused=True,
        )

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add a micro-batch's gradients, in the order of the model's parameters."""
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            # torch's fused AdamW reads memory in order, whatever the strides
            master.grad = gradient.float().contiguous() if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def step(self, learning_rate: float, clip_norm: float) -> float:
        """Clip, step, write the masters back. Returns the gradient's norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), clip_norm))
        if math.isfinite(norm):  # a NaN would poison every weight at once; the loop reports it
            for group, factor in zip(self.adamw.param_groups, self.factors, strict=True):
                group["lr"] = learning_rate * factor
            self.adamw.step()
            for name, weight in self.weights.items():
                if weight is not self.masters[name]:
                    weight.copy_(self.masters[name])
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, object]:
        return {"adamw": self.adamw.state_dict(), "masters": {name: m.detach() for name, m in self.masters.items()}}

    @torch.no_grad()
    def load_state(self, state: dict[str, object]) -> None:
        adamw, masters = state["adamw"], state["masters"]
        assert isinstance(adamw, dict) and isinstance(masters, dict)
        settings = [{key: group[key] for key in group if key != "params"} for group in self.adamw.param_groups]
        self.adamw.load_state_dict(adamw)
        for group, kept in zip(self.adamw.param_groups, settings, strict=True):
            group.update(kept)  # the recipe's, which may have changed since
        for name, master in self.masters.items():
            master.copy_(masters[name])
            self.weights[name].copy_(master)


def learning_rate(recipe: TrainSection, step: int, progress: float) -> float:
    """Linear warm-up by steps, then a fall from the peak to the final rate as `progress` goes from 0 to 1."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    left = 1 - min(progress, 1.0)
    height = left if recipe.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * height


def pick_dtype(wanted: str) -> torch.dtype:
    """`auto`: bfloat16 where the machine multiplies it faster than float32, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32
