"""Figures as plain data: what is shown, how it is read, what stands out. see/page and see/plates draw them.

Numbers that are not there are NaN: a layer without experts, a weight that is NaN itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Color = Literal["blue", "amber", "grey", "ink"]
DIGITS = 5  # of numbers in the page's data


@dataclass(frozen=True, slots=True)
class Line:
    """Values along a panel's places, or one in each of its rows. `strength` 0 to 1 orders the lines of a family."""

    name: str
    values: Floats
    color: Color = "blue"
    dashed: bool = False
    strength: float = 1.0
    named: bool = True  # in the legend


@dataclass(frozen=True, slots=True)
class Heat:
    """A cell for each row and column: `values` are what is told of a cell, `shades` -1 to 1 how it is coloured.

    ends: words for shade -1, 0 and 1. marks: cells with a dot on them, and mark_word what the dot says. Cells that are
    NaN bear a cross, unless blank says that there is nothing in such a place.
    """

    title: str
    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    shades: Floats
    ends: tuple[str, str, str]
    across: str = ""
    marks: NDArray[np.bool_] | None = None
    mark_word: str = ""
    blank: bool = False

    @property
    def crosses(self) -> NDArray[np.bool_]:
        return ~np.isfinite(self.values) & (not self.blank)


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines over common places, which bear names: layers, or numbers. levels: (value, what it stands for).

    With dots there is a place for each name, as for layers; without them places are numbers along a scale.
    """

    title: str
    unit: str
    places: tuple[str, ...]
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...] = ()
    across: str = ""
    log: bool = False
    dots: bool = True


@dataclass(frozen=True, slots=True)
class Dots:
    """A row for each thing, in it one dot for each line."""

    title: str
    unit: str
    rows: tuple[str, ...]
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...] = ()
    log: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Words and numbers; the first column names the rows, the last row is a sum where `summed`."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summed: bool = False
    across: str = ""


Panel = Heat | Curves | Dots | Table


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels under one title. `how` says in a sentence how they are read, `finding` what stands out in this file.

    key: name of the picture's file and of the place on the page.
    """

    key: str
    title: str
    how: str
    finding: str
    panels: tuple[Panel, ...] = field(default=())


def plain(value: Any) -> Any:
    """Figures, measures and arrays as JSON has them: numbers of five digits, null where one is not finite."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.name != "shades"}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if isfinite(value) else None
    return value


def ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers within an axis' limits; on a logarithmic one powers of ten, or 1, 2, 5 where few fit."""
    if log:
        decades = [10.0**n for n in range(int(np.ceil(np.log10(low) - 1e-9)), int(np.floor(np.log10(high) + 1e-9)) + 1)]
        if len(decades) > 1:
            return decades[:: -(-len(decades) // 5)]
        first = int(np.floor(np.log10(low)))
        fine = [m * 10.0**n for n in range(first, first + 3) for m in (1, 2, 5) if low <= m * 10.0**n <= high]
        if len(fine) > 1:
            return fine
    step = 10.0 ** np.floor(np.log10((high - low) / 3))
    step *= next(m for m in (5, 2.5, 2, 1) if (high - low) / (m * step) >= 3 or m == 1)
    return [float(f"{n * step:.12g}") for n in range(int(np.ceil(low / step)), int(np.floor(high / step + 1e-9)) + 1)]


def along(names: Sequence[str]) -> Floats:
    """Where names stand on an axis: numbers and layers at their number, others one after the name before them."""
    places: list[float] = []
    for name in names:
        word = name.removeprefix("layer ")
        places.append(float(word) if word.isdigit() else places[-1] + 1 if places else 0.0)
    return np.array(places)


def chosen(names: Sequence[str], most: int) -> list[int]:
    """Which of the names of an axis to write, about so many at most: the first, round numbers, the last."""
    places = along(names)
    span = places[-1] - places[0] + 1
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if span / step <= most), span)
    last, gap = len(names) - 1, 0.6 * step
    kept = [0]
    for i, place in enumerate(places):
        if place % step == 0 and place - places[kept[-1]] >= gap:
            kept.append(i)
    if places[last] - places[kept[-1]] >= gap:
        kept.append(last)
    elif kept[-1] != last and names[last].startswith("MTP"):
        kept[-1] = last
    return kept


def limits(lines: Sequence[Line], levels: Sequence[tuple[float, str]], log: bool) -> tuple[float, float]:
    """Where a value axis begins and ends: all that is finite, with some room; a linear one of positive values at 0."""
    values = np.concatenate([line.values.ravel() for line in lines] + [np.array([y for y, _ in levels])])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if log:
        room = max((high / low) ** 0.06, 1.12)
        return low / room, high * room
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if low >= 0 else low - room), high + room


def short(value: float) -> str:
    """A number in three digits, as words beside a figure have it."""
    if not isfinite(value):
        return "not finite"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}".replace("-", "−")
    if size >= 100:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def shades_of(values: Floats, limit: float) -> Floats:
    """Values as shades: -1 at -limit and below, 1 at limit and above."""
    return np.asarray(np.clip(values / limit, -1, 1))


def number(count: int, thing: str) -> str:
    """1 expert, 2 experts."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
