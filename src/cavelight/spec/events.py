"""What training reports while it runs: plain values, so that any screen, log file or test can read them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Losses are nats per next-token label (`mtp_loss` too, as the report divides it); `mtp_loss` and `balance_loss` are
    before their weights, and 0 where the model has no such part; `mtp_losses` has one for each depth. `max_vio` is
    max(load) / mean(load) - 1 of each MoE layer, in layer order, MTP modules last, and `bias_range` its largest routing
    bias minus its smallest. `peak_share` is the share of this machine's matmul peak that the model's own operations
    took. `skipped`: the update was left out.
    """

    step: int
    steps: int
    tokens: int
    rows: int
    loss: float
    mtp_loss: float
    mtp_losses: tuple[float, ...]
    balance_loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float
    peak_share: float
    max_vio: tuple[float, ...]
    bias_range: tuple[float, ...]
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out bits per byte after `step` steps; `whole` says whether all held-out text was read or a sample."""

    step: int
    bits_per_byte: float
    whole: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the model wrote after `step` steps; `acceptance` is the share of its drafts that held, by depth."""

    step: int
    prompt: str
    text: str
    acceptance: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Phase:
    """Progress of a long preparation such as tokenising: `done` of `total` `unit`s."""

    name: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint or export stands complete at `path`; `why` says what occasioned it."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the person at the screen."""

    text: str


Event = Step | Evaluated | Sampled | Phase | Saved | Note
