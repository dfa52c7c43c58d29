"""All cases of a benchmark in turn, the peer's between ours, so that whatever else the machine does meets both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from cavelight.bench.cases import Case, Measured, cache_bytes, measure
from cavelight.bench.probes import Probes, probe, read_bandwidth
from cavelight.model.transformer import Transformer
from cavelight.run.quick import without_native
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Phase

READING = 0.3  # seconds of the probe beside every case
VERIFIED = 5  # tokens of a verification that is compared with one
MEMORY = 1 << 32  # bytes that the cache of a case may take


class Peer(Protocol):
    name: str
    version: str

    def takes(self, case: Case) -> bool: ...

    def measure(self, case: Case) -> Measured: ...


@dataclass(frozen=True)
class Row:
    """A case, the peer's time for it if it took part, and the shares of what the machine can do."""

    ours: Measured
    theirs: Measured | None
    probes: Probes

    @property
    def bandwidth_share(self) -> float:
        """Of a step: what has to be read, over what could have been read in the time."""
        return self.ours.read / self.ours.typical / self.probes.read

    @property
    def peak_share(self) -> float:
        return self.ours.flops / self.ours.typical / self.probes.peak

    @property
    def ratio(self) -> float | None:
        """How many times the peer's tokens a second."""
        return self.theirs.typical / self.ours.typical if self.theirs else None

    def as_dict(self) -> dict[str, Any]:
        case = self.ours.case
        return {
            "name": case.name,
            "kind": case.kind,
            "depth": case.depth,
            "tokens": case.tokens,
            "batch": case.batch,
            "tokens_per_second": self.ours.tokens_per_second,
            "seconds": self.ours.typical,
            "steps": len(self.ours.seconds),
            "bytes": self.ours.read,
            "flops": self.ours.flops,
            "bandwidth_share": self.bandwidth_share,
            "peak_share": self.peak_share,
            "peer_tokens_per_second": self.theirs.tokens_per_second if self.theirs else None,
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class LeftOut:
    """A case that was asked for and cannot be measured."""

    case: Case
    why: str


def cases(
    config: ModelConfig,
    dtype: torch.dtype,
    prompts: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
    memory: int = MEMORY,
) -> tuple[list[Case], list[LeftOut]]:
    """Prompts, decoding at each depth, verifying at the deepest that there is room for, batches at the shallowest.

    memory: bytes that the cache of a case may take.
    """
    limit, found, left_out = config.max_position_embeddings, list[Case](), list[LeftOut]()
    deepest = max((depth for depth in depths if depth + VERIFIED <= limit), default=None)
    wanted = [Case("prompt", 0, tokens) for tokens in prompts]
    wanted += [Case("decoding", depth) for depth in depths]
    wanted += [Case("verifying", deepest, VERIFIED)] if deepest is not None else []
    wanted += [Case("decoding", min(depths), 1, batch) for batch in batches if batch > 1] if depths else []
    for case in dict.fromkeys(wanted):
        needed = cache_bytes(config, case, dtype)
        if case.depth + case.tokens > limit:
            left_out.append(LeftOut(case, f"the model's context has {limit:,} tokens"))
        elif needed > memory:
            left_out.append(
                LeftOut(case, f"the cache would take {needed / 1e9:,.1f} GB of at most {memory / 1e9:,.1f}")
            )
        else:
            found.append(case)
    return found, left_out


def sweep(
    model: Transformer,
    wanted: Sequence[Case],
    peer: Peer | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    *,
    cache: torch.dtype | None = None,
) -> list[Row]:
    """Measure them all once kernels.native is built. cache: the rows' dtype; the weights' unless given."""
    without_native()
    probes, rows = probe(), []
    for number, case in enumerate(wanted):
        on_event(Phase("measuring", number, len(wanted), "cases"))
        theirs = peer.measure(case) if peer and peer.takes(case) else None
        read = read_bandwidth(seconds=READING)  # neighbours come and go
        rows.append(Row(measure(model, case, cache=cache), theirs, replace(probes, read=read)))
    on_event(Phase("measuring", len(wanted), len(wanted), "cases"))
    return rows
