"""What is known of a run from its folder's logs alone: no weights are read, and the run may still be under way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cavelight.disk import json_lines
from cavelight.errors import UserError
from cavelight.see.series import Series, layer_names
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunLog:
    """A run as its metrics.jsonl, its recipe.json and, where it was saved already, its model's config.json tell it.

    samples: lines of kind "sampled". happened: lines of all kinds that are not numbers of a step, in their order.
    sessions: lines of sessions.jsonl, one for each time that the run began or went on.
    reference: bits per byte to compare with, such as {"xz -9e": 1.79}.
    """

    title: str
    series: Series
    steps: int = 0  # that the run is to have in all, as far as it is known
    samples: tuple[Line, ...] = ()
    happened: tuple[Line, ...] = ()
    sessions: tuple[Line, ...] = ()
    recipe: Line = field(default_factory=dict)
    config: ModelConfig | None = None
    reference: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folder: Path, metrics: Sequence[Line], reference: Mapping[str, float] | None = None, title: str = ""
    ) -> Self:
        """metrics: the lines of the folder's metrics.jsonl. Raises UserError for a run without a step."""
        series = Series.of(metrics)
        if not len(series.step_P):
            raise UserError(
                f"There is nothing to draw of {folder}",
                why="its metrics.jsonl holds no step yet",
                do="look again when the run has begun",
            )
        recipe = _json(folder / "recipe.json")
        return cls(
            title=title or f"The run {folder.resolve().name}",
            series=series,
            steps=next(line["steps"] for line in reversed(metrics) if line["kind"] == "step"),
            samples=tuple(line for line in metrics if line["kind"] == "sampled"),
            happened=tuple(line for line in metrics if line["kind"] not in ("step", "evaluated", "sampled")),
            sessions=tuple(json_lines(folder / "sessions.jsonl")),
            recipe=recipe,
            config=_config(folder, recipe),
            reference=reference or {},
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers with experts."""
        return layer_names(self.series, self.config)

    @property
    def spikes(self) -> list[int]:
        """Steps whose loss stood out."""
        return [line["step"] for line in self.happened if line["kind"] == "spike" and "step" in line]

    def of_recipe(self, section: str, key: str) -> Any:
        """A key of the recipe; None where it is not known."""
        return (self.recipe.get(section) or {}).get(key)


def _json(path: Path) -> Line:
    """A JSON object; an empty one where there is none to read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _config(folder: Path, recipe: Line) -> ModelConfig | None:
    """The configuration as exported, or before the first save as the recipe names it."""
    try:
        if exported := _json(folder / "model" / "config.json"):
            return ModelConfig.from_hf(dict(exported))
        if model := recipe.get("model"):
            return preset(model["preset"]).replace(**model.get("overrides", {}))
    except (UserError, LookupError, TypeError):
        return None
    return None
