"""What an experiment is: variants of one recipe, what is read of each run, and what is said of all of them."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cavelight.errors import UserError
from cavelight.experiment.statistics import Estimate, estimate, paired
from cavelight.see.series import Series
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event
from cavelight.spec.recipe import Recipe
from cavelight.spec.variants import with_plain_attention
from cavelight.train.state import RunFolder, read_metrics

HERE = Path(__file__).parent
SECTIONS = ("model", "data", "train")
Listener = Callable[[Event], None]
Measure = Callable[[Recipe, RunFolder, Listener], dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One way to train. `key` names its folders, `label` its row in the table."""

    key: str
    label: str
    recipe: Recipe

    @property
    def config(self) -> ModelConfig:
        return self.recipe.config

    def seeded(self, seed: int) -> Recipe:
        return Recipe.build(_merged(self.recipe.model_dump(), {"train": {"seed": seed}}))


@dataclass(frozen=True)
class Study:
    """An experiment as its TOML file has it; the first variant is the one that others are compared with.

    `question` says what is asked and what the report or paper found, `setting` what the page adds about the runs.
    """

    name: str
    title: str
    question: str
    setting: str
    variants: tuple[Variant, ...]

    @classmethod
    def read(cls, name: str, changes: Sequence[str], resolve: Callable[[Any], Any] = lambda corpus: corpus) -> "Study":
        """The experiment NAME.toml on base.toml, with `section.key=value` changes to what all variants begin from.

        resolve: what becomes of `data.corpus` before anything is trained. Raises UserError for recipes with mistakes.
        """
        values = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
        common = tomllib.loads((HERE / "base.toml").read_text(encoding="utf-8"))
        common = _merged(common, _sections(values))
        base = Recipe.build(common, changes).model_dump()
        base["data"]["corpus"] = resolve(base["data"]["corpus"])
        return cls(
            name,
            values["title"],
            values["question"].strip(),
            values.get("setting", "").strip(),
            tuple(_variant(base, variant) for variant in values["variants"]),
        )

    def of(self, key: str) -> Variant:
        return next(variant for variant in self.variants if variant.key == key)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what was found about it."""

    seed: int
    folder: RunFolder
    found: Mapping[str, Any]

    @cached_property
    def series(self) -> Series:
        return Series.of(read_metrics(self.folder.metrics))


@dataclass(frozen=True)
class Outcome:
    """All runs of a study by the key of their variant, in the order of the seeds, which all have alike."""

    study: Study
    runs: Mapping[str, Sequence[Run]]

    def values(self, key: str, read: Callable[[Run], float]) -> list[float]:
        return [read(run) for run in self.runs[key]]

    def of(self, key: str, read: Callable[[Run], float]) -> Estimate:
        """The variant's mean over the seeds."""
        return estimate(self.values(key, read))

    def difference(self, key: str, read: Callable[[Run], float], reference: str = "") -> Estimate:
        """The variant less the reference (the first one unless told), paired by seed."""
        return paired(self.values(key, read), self.values(reference or self.study.variants[0].key, read))


@dataclass(frozen=True)
class Told:
    """What the page says of an outcome: a table, whose first row is its head, and sentences that the numbers chose."""

    table: Sequence[Sequence[str]]
    verdict: Sequence[str]


def bits(run: Run) -> float:
    """Bits per byte on all held-out text."""
    return float(run.found["bits_per_byte"])


def _variant(base: Mapping[str, Any], values: Mapping[str, Any]) -> Variant:
    sections = _sections(values)
    sections["model"] = {"overrides": sections.get("model", {})}
    recipe = Recipe.build(_merged(base, sections))
    if heads := values.get("key_value_heads"):
        plain = with_plain_attention(recipe.config, heads)
        own = {key: value for key, value in plain if value != getattr(recipe.config, key)}
        recipe = Recipe.build(_merged(recipe.model_dump(), {"model": {"overrides": own}}))
    if recipe.train.steps is None or recipe.train.minutes is not None:
        raise UserError(
            "The runs of an experiment end after a number of steps",
            why="by the clock each would be as long as the machine is free",
            do="set train.steps, and leave train.minutes alone",
        )
    return Variant(values["key"], values["label"], recipe)


def _sections(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in SECTIONS if key in values}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables: what `above` has takes the place of what is below."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
