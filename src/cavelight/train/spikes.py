"""When a step's loss leaves the path of those before it: not finite, or far above their mean."""

import math
from dataclasses import dataclass

KEPT = 0.98  # of the running mean at each step: it looks back on about the last fifty
FEWEST = 50  # steps before anything is called a spike


@dataclass
class SpikeWatch:
    """Running mean and variance of a run's losses, and how many steps in a row were left out.

    A loss above the ceiling counts as if it had just reached it. So a spike hardly moves the mean, while a run whose
    losses stay up (on harder text, say) is believed after a few steps.
    """

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    left_out: int = 0

    def ceiling(self, factor: float) -> float:
        """The loss above which a step is a spike: `factor` deviations over the mean, in nats."""
        return self.mean + factor * math.sqrt(self.variance) if self.seen >= FEWEST else math.inf

    def take(self, loss: float, factor: float, skipped: bool) -> None:
        """Count a step, whether or not its update was left out."""
        self.left_out = self.left_out + 1 if skipped else 0
        if not math.isfinite(loss):
            return
        # The plain mean and variance of all losses at first, then exponentially weighted ones.
        share = max(1 / (self.seen + 1), 1 - KEPT)
        above = min(loss, self.ceiling(factor)) - self.mean
        self.mean += share * above
        self.variance = (1 - share) * (self.variance + share * above**2)
        self.seen += 1
