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

    Moments are kept in `dtype`, and rounded to it after each step. They stand from the beginning, below whatever a step
    allocates: made within one, they would lie scattered among what it frees again.
    """

    def __init__(
        self, groups: Iterable[Sequence[nn.Parameter]], betas: tuple[float, float], dtype: torch.dtype = torch.float32
    ) -> None:
        self.groups, self.betas, self.dtype = [list(group) for group in groups], betas, dtype
        self.moments = {
            parameter: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros(parameter.shape, dtype=dtype, device=parameter.device),
                "exp_avg_sq": torch.zeros(parameter.shape, dtype=dtype, device=parameter.device),
            }
            for group in self.groups
            for parameter in group
        }

    @torch.no_grad()
    def step(self, rates: Sequence[float], decays: Sequence[float]) -> None:
        """`rates` and `decays` go by group."""
        for group, rate, decay in zip(self.groups, rates, decays, strict=True):
            reached = [parameter for parameter in group if parameter.grad is not None]
            # Narrow moments are widened for one parameter at a time.
            together = [reached] if self.dtype == torch.float32 else [[parameter] for parameter in reached]
            for some in together:
                self._update(some, rate, decay)

    def _update(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        moments = [self.moments[parameter] for parameter in parameters]
        wide = {kind: [moment[kind].float() for moment in moments] for kind in ("exp_avg", "exp_avg_sq")}
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            wide["exp_avg"],
            wide["exp_avg_sq"],
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
        for kind, tensors in wide.items():
            for moment, tensor in zip(moments, tensors, strict=True):
                moment[kind].copy_(tensor)  # nothing where they are one

    def state(self) -> dict[str, Any]:
        """Moments by the parameters' places in the groups, as torch.optim.AdamW has them; no copies."""
        return {"state": dict(enumerate(self.moments.values()))}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Of the same groups, whatever its moments' dtype, torch.optim.AdamW's too.

        That one, in saves of earlier versions, has none of what no gradient had reached: it begins anew.
        """
        for place, moments in enumerate(self.moments.values()):
            kept: dict[str, Tensor] = state["state"].get(place, {})
            for kind, tensor in moments.items():
                tensor.copy_(kept[kind]) if kept else tensor.zero_()
