"""An exponential average of the weights: what a run would be like after its learning rate had fallen.

The report kept one in the CPU's memory to judge a run early (V3 report, section 3.2.3).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cavelight.model.transformer import Transformer


class Ema:
    """The average of every weight, in float32 and in the CPU's memory. Routing biases are none: they follow the load.

    `decay` is what stays of it at each step: at step t (from 0) at most (1 + t) / (10 + t), so that a young average
    does not hold on to the initial weights.
    """

    def __init__(self, model: Transformer, decay: float) -> None:
        self.decay = decay
        self.average = {name: weight.detach().float().cpu().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor], step: int) -> None:
        """Once after each step (number `step`, from 0), from the optimizer's float32 weights."""
        stays = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(masters[name].to(average), 1 - stays)

    @contextmanager
    def swapped(self, model: Transformer) -> Iterator[None]:
        """Within, the model's weights are the average, in the model's dtype; afterwards its own, to the bit."""
        own = {name: weight.data for name, weight in model.named_parameters()}
        for name, weight in model.named_parameters():
            weight.data = self.average[name].to(weight)
        try:
            yield
        finally:
            for name, weight in model.named_parameters():
                weight.data = own[name]

    def state(self) -> dict[str, Tensor]:
        """By the parameters' names; the tensors are the average's own, not copies."""
        return dict(self.average)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])
