"""AdamW by torch's fused kernel (arXiv 1711.05101).

By its function, not by torch.optim.AdamW: building that one imports torch's compiler, which takes 65 MB and a second.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

EPS = 1e-8


class AdamW:
    """Groups of parameters, each with a rate and a weight decay of its own; what has no gradient stays as it is.

    Moments stand from the beginning, below whatever a step allocates: made within one, they would lie scattered among
    what it frees again.
    """

    def __init__(self, groups: Iterable[Sequence[nn.Parameter]], betas: tuple[float, float]) -> None:
        self.groups, self.betas = [list(group) for group in groups], betas
        self.moments = {
            parameter: {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
            }
            for group in self.groups
            for parameter in group
        }

    @torch.no_grad()
    def step(self, rates: Sequence[float], decays: Sequence[float]) -> None:
        """`rates` and `decays` go by group."""
        for group, rate, decay in zip(self.groups, rates, decays, strict=True):
            reached = {p: p.grad for p in group if p.grad is not None}
            moments = [self.moments[parameter] for parameter in reached]
            adamw(
                list(reached),
                list(reached.values()),
                *([moment[kind] for moment in moments] for kind in ("exp_avg", "exp_avg_sq")),
                [],
                [moment["step"] for moment in moments],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rate,
                weight_decay=decay,
                eps=EPS,
                maximize=False,
            )

    def state(self) -> dict[str, Any]:
        """Moments by the parameters' places in the groups, as torch.optim.AdamW has them; no copies."""
        return {"state": dict(enumerate(self.moments.values()))}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Of the same groups. What is not in it, since no gradient had reached it, begins anew."""
        for place, moments in enumerate(self.moments.values()):
            for kind, tensor in moments.items():
                kept: dict[str, Tensor] = state["state"].get(place, {})
                tensor.copy_(kept[kind]) if kept else tensor.zero_()
