"""What a check of the doctor says: a verdict, one sentence, and the numbers behind it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "warn", "fail"]
SEVERITY: dict[Verdict, int] = {"fail": 0, "warn": 1, "pass": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    `sentence` says what was seen, what it means and, unless all is well, what to do. `trap` is the number that
    docs/doctor.md gives the mistake, `value` holds plain numbers and names for JSON.
    """

    check: str
    verdict: Verdict
    sentence: str
    trap: int | None = None
    value: dict[str, Any] = field(default_factory=dict)


def passed(check: str, sentence: str, trap: int | None = None, **value: Any) -> Finding:
    """Nothing to object to."""
    return Finding(check, "pass", sentence, trap, value)


def warned(check: str, sentence: str, trap: int | None = None, **value: Any) -> Finding:
    """It can be run as it is, but something else will stumble over it, or it is probably not what was meant."""
    return Finding(check, "warn", sentence, trap, value)


def failed(check: str, sentence: str, trap: int | None = None, **value: Any) -> Finding:
    """Whoever runs it as it is gets wrong numbers, or none."""
    return Finding(check, "fail", sentence, trap, value)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Fails, warnings, passes; within each in the order of the examination."""
    return sorted(findings, key=lambda finding: SEVERITY[finding.verdict])
