"""Initialisation by role, AdamW on float32 masters, and the learning rate."""

import math

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

    Norms are exempt from weight decay: pulling a gain towards zero is no regularisation.
    """

    def __init__(self, model: Transformer, recipe: TrainSection) -> None:
        roles = {parameter.name: parameter.role for parameter in parameters(model.config)}
        self.masters: dict[str, nn.Parameter] = {}
        self.weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        for name, weight in self.weights.items():
            self.masters[name] = weight if weight.dtype == torch.float32 else self._master(weight)
        decayed = [master for name, master in self.masters.items() if roles[name] != "norm"]
        others = [master for name, master in self.masters.items() if roles[name] == "norm"]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(recipe.beta1, recipe.beta2),
            fused=True,
        )

    @staticmethod
    def _master(weight: nn.Parameter) -> nn.Parameter:
        master = nn.Parameter(weight.detach().float())

        def move_gradient(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

        weight.register_post_accumulate_grad_hook(move_gradient)
        return master

    @torch.no_grad()
    def step(self, learning_rate: float, clip_norm: float) -> float:
        """Clip, step, write the masters back. Returns the gradient's norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), clip_norm))
        if math.isfinite(norm):  # a NaN would poison every weight at once; the loop reports it
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
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
        self.adamw.load_state_dict(adamw)
        for name, master in self.masters.items():
            master.copy_(masters[name])
            self.weights[name].copy_(master)


def learning_rate(recipe: TrainSection, step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine from the peak to the final rate as `progress` goes from 0 to 1."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    fall = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * fall


def pick_dtype(wanted: str) -> torch.dtype:
    """`auto`: bfloat16 where the machine multiplies it faster than float32, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32
