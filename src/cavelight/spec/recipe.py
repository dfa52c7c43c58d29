"""What a training run is made of, as read from a TOML file: no torch, so that a mistake is told in a blink."""

import difflib
import glob
import os
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from cavelight.disk import checkpoint_folder
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset
from cavelight.spec.sections import DataSection, ModelSection, Section, TrainSection

CORPORA = ("stdlib", "needles")  # that have names of their own
RECIPES = Path(__file__).parent.parent / "recipes"


class Recipe(Section):
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """A recipe file, or the name of one that comes along (`demo`), with `section.key=value` overrides."""
        return cls.build(_parse(Path(path)), overrides)

    @classmethod
    def build(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> "Recipe":
        merged: dict[str, Any] = deepcopy(dict(values))
        for override in overrides:
            _apply(merged, override)
        _make_absolute(merged)
        try:
            recipe = cls.model_validate(merged)
        except ValidationError as error:
            raise UserError("The recipe has mistakes", got=_sentences(error), do="correct these keys") from error
        recipe._check()
        return recipe

    def _check(self) -> None:
        problems = []
        train = self.train
        if train.steps is None and train.minutes is None:
            problems.append("neither train.steps nor train.minutes says when to stop")
        if train.rows_per_microbatch and train.rows_per_step % train.rows_per_microbatch:
            problems.append(
                f"train.rows_per_step {train.rows_per_step} is no multiple of "
                f"train.rows_per_microbatch {train.rows_per_microbatch}"
            )
        if train.ramp_from_rows and (
            train.ramp_from_rows > train.rows_per_step
            or train.ramp_from_rows % (train.rows_per_microbatch or train.rows_per_step)
        ):
            problems.append(
                f"train.ramp_from_rows {train.ramp_from_rows} is no multiple of train.rows_per_microbatch "
                f"{train.rows_per_microbatch or train.rows_per_step} up to train.rows_per_step {train.rows_per_step}"
            )
        experts = self.config.n_routed_experts or 0
        if (train.device_alpha or train.communication_alpha) and experts % train.balance_devices:
            problems.append(f"train.balance_devices {train.balance_devices} does not divide {experts} experts evenly")
        if self.data.row_length > self.config.max_position_embeddings:
            problems.append(
                f"data.row_length {self.data.row_length} exceeds the model's "
                f"max_position_embeddings {self.config.max_position_embeddings}"
            )
        if problems:
            raise UserError("The recipe has mistakes", got="; ".join(problems), do="correct these keys")

    @property
    def config(self) -> ModelConfig:
        """The model: the preset or the given weights' own, with the overrides in place, validated as a whole."""
        weights = self.model.weights
        base = ModelConfig.read(checkpoint_folder(weights)) if weights else preset(self.model.preset)
        return base.replace(**self.model.overrides)


def _make_absolute(values: dict[str, Any]) -> None:
    """Paths as they are seen from here, so that a run goes on wherever it is called from. Names stay names."""
    data, model = values.get("data"), values.get("model")
    places = [(data, "corpus"), (data, "tokenizer"), (model, "weights")]
    corpus = data.get("corpus") if isinstance(data, dict) else None
    places += [(source, "corpus") for source in corpus] if isinstance(corpus, list | tuple) else []
    for section, key in places:
        path = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(path, str):
            section[key] = absolute(path)


def absolute(path: str) -> str:
    """`path` as it is seen from anywhere; a corpus' name, and what is not there, as it is."""
    if path in ("", *CORPORA) or not (glob.has_magic(path) or Path(path).expanduser().exists()):
        return path
    return os.path.abspath(Path(path).expanduser())


def _parse(path: Path) -> dict[str, Any]:
    named = RECIPES / f"{path}.toml"
    source = named if not path.suffix and named.is_file() else path
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise UserError("There is no such recipe", got=str(path), do=f"name a TOML file, or one of: {known}") from error
    except IsADirectoryError as error:
        raise UserError("A recipe is a TOML file, this is a folder", got=str(path), do="name the file in it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file in UTF-8", got=str(error), do="correct it at that place") from error


def _apply(values: dict[str, Any], override: str) -> None:
    """`train.steps=200`: the value in TOML's notation, or a bare word; `none` for a key that may be missing."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise UserError("An override reads section.key=value", got=override, do="write for example train.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise UserError(f"{section} is a section of the recipe, not a value", got=str(target), do=f"write [{section}]")
    if section == "model" and name not in ("preset", "weights"):
        target = target.setdefault("overrides", {})
        if not isinstance(target, dict):
            raise UserError(
                "model.overrides is a table, not a value",
                got=repr(target),
                do="write overrides = { hidden_size = 256 }",
            )
        name = name.removeprefix("overrides.")
        optional = _is_optional(ModelConfig, name)
    else:
        kind = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
        optional = _is_optional(kind, name)
    target[name] = None if optional and text.strip() == "none" else value


def _is_optional(kind: Any, name: str) -> bool:
    """Whether a field of this model may be None."""
    field = kind.model_fields.get(name) if kind else None
    return field is not None and type(None) in get_args(field.annotation)


def _sentences(error: ValidationError) -> str:
    """All of pydantic's findings in one line, with the nearest known key for an unknown one."""
    known = {f"{section}.{key}" for section, keys in Recipe().model_dump().items() for key in keys}
    parts = []
    for detail in error.errors():
        place = ".".join(str(step) for step in detail["loc"])
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(place, known, 1)
            parts.append(f"unknown key {place}" + (f" (did you mean {near[0]}?)" if near else ""))
        else:
            given = (
                ""
                if isinstance(detail["input"], Mapping) and detail["type"] == "value_error"
                else f" = {detail['input']!r}"
            )
            parts.append(f"{place}{given}: {detail['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)
