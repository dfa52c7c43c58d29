"""All experiments by name: what each reads of a run, how it tells and draws what was found."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cavelight.errors import UserError
from cavelight.experiment import attention, balance, fp8, mtp, shape, specialisation
from cavelight.experiment.study import Listener, Measure, Outcome, Told
from cavelight.spec.recipe import Recipe
from cavelight.train.state import RunFolder


def nothing(recipe: Recipe, folder: RunFolder, on_event: Listener) -> dict[str, Any]:
    """For experiments that need no more of a run than every run is asked."""
    return {}


@dataclass(frozen=True)
class Entry:
    tell: Callable[[Outcome], Told]
    draw: Callable[[Outcome, Path], None]
    measure: Measure = nothing


CATALOGUE = {
    "attention": Entry(attention.tell, attention.draw),
    "mtp": Entry(mtp.tell, mtp.draw, mtp.measure),
    "balance": Entry(balance.tell, balance.draw),
    "specialisation": Entry(specialisation.tell, specialisation.draw, specialisation.measure),
    "fp8": Entry(fp8.tell, fp8.draw),
    "shape": Entry(shape.tell, shape.draw),
}


def entry(name: str) -> Entry:
    """The experiment of that name. Raises UserError that lists the names."""
    if name not in CATALOGUE:
        close = get_close_matches(name, CATALOGUE, n=1)
        raise UserError(
            f"There is no experiment {name!r}",
            why=f"there are {', '.join(CATALOGUE)}",
            do=f"did you mean {close[0]}?" if close else "choose one of these",
        )
    return CATALOGUE[name]
