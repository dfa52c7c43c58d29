"""The examination: headers first, then weights, then the model as it runs, each level with all the checks below it.

Every check is a function from the case, and from what was gathered of its weights, to findings; here they are put in
a row.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

from cavelight.doctor import configuration, headers, prediction, rotary, routing, tokens, weights
from cavelight.doctor.case import Case, open_case
from cavelight.doctor.findings import Finding, failed
from cavelight.doctor.running import ENGINES, beside_another, on_model
from cavelight.doctor.statistics import gather
from cavelight.errors import UserError
from cavelight.spec.events import Event
from cavelight.weights.stored import Checkpoint

Level = Literal["headers", "weights", "model"]
LEVELS: tuple[Level, ...] = get_args(Level)
ON_HEADERS = (*configuration.CHECKS, *headers.CHECKS, *tokens.CHECKS)
ON_FITTING = (*routing.CHECKS, *prediction.CHECKS, *rotary.CHECKS)  # which rely on shapes


def examine(
    folder: Path,
    level: Level = "weights",
    text: str | None = None,
    against: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Finding]:
    """Examine a checkpoint folder and say what was found, in the order of the checks.

    level: "headers" reads configuration and headers only; "weights" also every tensor, once; "model" also runs it.
    text: what to run it on; Python's own library unless given. against: "transformers" to compare with, part by part.
    Raises UserError where `folder` is no checkpoint at all; anything else that is wrong is a finding.
    """
    if level not in LEVELS:
        raise UserError(f"There is no level {level!r}", do=f"choose one of {', '.join(LEVELS)}")
    if against is not None and against not in ENGINES:
        raise UserError(f"Nothing is known of {against!r} to compare with", do=f"choose {', '.join(ENGINES)}")
    case = open_case(folder)
    findings = [finding for check in ON_HEADERS for finding in check(case)]
    if level != "headers":
        findings += on_weights(case, on_event)
    if level == "model":
        findings += on_model(case, text, on_event)
    if against is not None:
        findings += beside_another(case, against, text, on_event)
    return findings


def on_weights(case: Case, on_event: Callable[[Event], None]) -> Iterator[Finding]:
    """All checks of values, on one reading of the files."""
    try:
        checkpoint = Checkpoint(case.folder)
    except UserError as refusal:
        if refusal.what not in {other.what for other in case.refusals.values()}:
            yield failed("weights", f"The weights were not examined: {refusal}")
        return
    found = gather(checkpoint, on_event)
    for check in weights.CHECKS:
        yield from check(case, found)
    fitting = found.fitting({name: tensor.shape for name, tensor in case.wanted.items()})
    for check in ON_FITTING:
        yield from check(case, fitting)
