"""What a generation did, what its drafts were worth, and how to say so."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest
from statistics import fmean, median
from typing import Any

WINDOW = 16  # rounds over which it is judged whether drafts pay
CANCELLED = "cancelled"  # as an end
RECENT = 3  # plain steps that stand for plain decoding, the latest ones: steps get slower as the context grows


@dataclass
class Stats:
    """Counts and times of one generation, kept up to date while it runs.

    A plain step makes one token without drafts; when speculation is on a few are made all the same, to measure them.
    A round verifies drafts; `round_tokens` says how many tokens each one made, its seconds include the drafting.
    `proposed[j]` and `accepted[j]` count drafts j + 1 places ahead.
    """

    prompt_tokens: int
    drafts: int = 0
    new_tokens: int = 0
    queue_seconds: float = 0.0  # before it began
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    plain_seconds: list[float] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)
    round_tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    settled: int = 0  # near-ties that were settled by a second computation
    off: str | None = None  # why speculation was turned off, or never on
    without_native: str | None = None  # why the plain modules did what kernels.native would do faster
    finish: str | None = None  # why the generation ended

    def add_round(self, drafts: Sequence[int], new: Sequence[int], seconds: float | None) -> int:
        """Count a round that verified `drafts` and made `new` tokens; seconds: None if others had part in its time.

        Returns how many drafts were accepted: those that `new` begins with.
        """
        if seconds is not None:
            self.round_seconds.append(seconds)
        self.round_tokens.append(len(new))
        same = (draft == token for draft, token in zip(drafts, new, strict=False))
        kept = sum(takewhile(bool, same))
        self.proposed = added(self.proposed, [1] * len(drafts))
        self.accepted = added(self.accepted, [int(j < kept) for j in range(len(drafts))])
        return kept

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token, which the prompt's pass makes, is not counted."""
        return max(0, self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        return fmean(self.round_tokens) if self.round_tokens else 1.0

    @property
    def gain(self) -> float | None:
        """How many times faster rounds made tokens than plain steps did in the same run; None if not measured."""
        if not self.round_seconds or not self.plain_seconds:
            return None
        return self.tokens_per_round * median(self.plain_seconds) / median(self.round_seconds)

    def measured_cost(self) -> float:
        """What one of the last rounds took, in plain steps of that time."""
        return median(self.round_seconds[-WINDOW:]) / median(self.plain_seconds[-RECENT:])

    def judge(self, cost: float) -> bool:
        """Whether the last rounds made at least as many tokens as `cost`, their cost in plain steps; else notes why."""
        tokens = fmean(self.round_tokens[-WINDOW:])
        if tokens < cost:
            self.off = (
                f"after {len(self.round_tokens)} rounds: {tokens:.2f} tokens a round, "
                f"which costs as much as {cost:.2f} plain steps"
            )
        return tokens >= cost

    def report(self) -> str:
        """Two lines for people, and a third one where native layers are missing."""
        ended = f"; ended by the {self.finish}" if self.finish else ""
        ended = "; cancelled" if self.finish == CANCELLED else ended
        first = (
            f"{self.new_tokens} tokens, {self.tokens_per_second:.1f} a second, "
            f"after a prompt of {self.prompt_tokens} in {self.prefill_seconds:.2f} s{ended}."
        )
        lines = [first, self._speculation()]
        return "\n".join(lines + ([f"Without native layers: {self.without_native}."] if self.without_native else []))

    def _speculation(self) -> str:
        if not self.round_tokens:
            return f"No speculation: {self.off}." if self.off else "No speculation."
        rates = (
            f"{_ordinal(j + 1)} {accepted / proposed:.0%}"
            for j, (accepted, proposed) in enumerate(zip(self.accepted, self.proposed, strict=True))
        )
        gain = f", {self.gain:.2f} times as fast as plain decoding" if self.gain is not None else ""
        off = f" Turned off {self.off}." if self.off else ""
        return f"Drafts accepted: {', '.join(rates)}; {self.tokens_per_round:.2f} tokens a round{gain}.{off}"

    def as_dict(self) -> dict[str, Any]:
        """The same for machines: counts, seconds and ratios, ready for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "queue_seconds": self.queue_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
            "drafts": self.drafts,
            "rounds": len(self.round_tokens),
            "plain_steps": len(self.plain_seconds),
            "proposed": self.proposed,
            "accepted": self.accepted,
            "tokens_per_round": self.tokens_per_round,
            "gain": self.gain,
            "settled": self.settled,
            "off": self.off,
            "without_native": self.without_native,
            "finish": self.finish,
        }


def added(some: Sequence[int], more: Sequence[int]) -> list[int]:
    """Counts by depth of two generations together."""
    return [a + b for a, b in zip_longest(some, more, fillvalue=0)]


def _ordinal(n: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(n, f"{n}th")
