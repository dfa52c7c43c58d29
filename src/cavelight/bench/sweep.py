"""All cases of a benchmark in turn, the peer's between ours, so that whatever else the machine does meets both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cavelight.bench.cases import Case, Measured, measure
from cavelight.bench.probes import Probes, probe
from cavelight.model.transformer import Transformer
from cavelight.spec.cost import stored_bytes_per_token
from cavelight.spec.events import Event, Phase

VERIFIED = 5  # tokens of a verification that is compared with one


class Peer(Protocol):
    name: str

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


def cases(limit: int, prompts: Sequence[int], depths: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """Prompts, decoding at each depth, verifying at the deepest, batches at the shallowest; as far as they fit."""
    wanted = [Case(0, tokens) for tokens in prompts]
    wanted += [Case(depth) for depth in depths]
    wanted += [Case(max(depths), VERIFIED)] if depths else []
    wanted += [Case(min(depths), 1, batch) for batch in batches if batch > 1] if depths else []
    return [case for case in wanted if case.depth + case.tokens <= limit]


def sweep(
    model: Transformer,
    wanted: Sequence[Case],
    peer: Peer | None = None,
    memory: int = 1 << 32,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Row]:
    """Measure them; those whose caches take more than `memory` bytes are left out."""
    probes, rows = probe(), []
    each = stored_bytes_per_token(model.config, model.lm_head.weight.element_size(), mtp=True)
    wanted = [case for case in wanted if case.batch * (case.depth + case.tokens) * each <= memory]
    for number, case in enumerate(wanted):
        on_event(Phase("measuring", number, len(wanted), "cases"))
        theirs = peer.measure(case) if peer and peer.takes(case) else None
        rows.append(Row(measure(model, case), theirs, probes))
    on_event(Phase("measuring", len(wanted), len(wanted), "cases"))
    return rows
