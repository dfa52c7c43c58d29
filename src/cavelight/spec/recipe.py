"""What a training run is made of, as read from a TOML file: no torch, so that a mistake is told in a blink."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset

RECIPES = Path(__file__).parent.parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    """A preset, and any field of its ModelConfig to change."""

    preset: str = "demo"
    overrides: dict[str, Any] = Field(default_factory=dict)


class DataSection(_Section):
    corpus: str = "stdlib"  # or any file, folder or glob of text or JSONL
    text_key: str = "text"  # of a JSONL line
    held_out_every: int = Field(default=20, ge=2)  # one document in so many is never trained on
    tokenizer: str | None = None  # a tokenizer.json or a folder with one; otherwise trained on the corpus
    row_length: PositiveInt = 512  # tokens that see one another at most
    mask_documents: bool = False  # whether attention stops at a document's end; V3's pre-training did not
    split_line_ends: float = Field(default=0.1, ge=0, le=1)  # share of "signs, line end" tokens that are met as two


class TrainSection(_Section):
    """Optimisation and losses. Defaults are the report's (V3, section 4.2), where it names them."""

    steps: PositiveInt | None = None
    minutes: PositiveFloat | None = (
        None  # a budget of time instead, or as well: the schedule ends with whichever is first
    )
    rows_per_step: PositiveInt = 8
    rows_per_microbatch: PositiveInt | None = None  # rows that one core takes at once; the gradient is the same
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and activations; masters are always float32
    init_std: PositiveFloat = 0.006
    learning_rate: PositiveFloat = 2.2e-4
    embedding_rate: PositiveFloat = 1.0  # the embedding learns at so many times the learning rate,
    head_rate: PositiveFloat = 1.0  # and the head at so many: in a short run most of their rows are met rarely
    final_learning_rate: NonNegativeFloat = 2.2e-5
    decay: Literal["cosine", "linear"] = "cosine"  # how the rate falls from the peak to its end
    warmup_steps: int = Field(default=2000, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat = 1.0
    mtp_weight: NonNegativeFloat = 0.3  # lambda
    balance_alpha: NonNegativeFloat = 1e-4  # of the sequence-wise balance loss
    bias_speed: NonNegativeFloat = 1e-3  # gamma; 0 turns the bias balancing off
    evaluate_every: PositiveInt | None = 100  # steps between looks at held-out text
    evaluate_bytes: PositiveInt = 32_768  # how much held-out text such a look reads; the last one reads all
    save_every: PositiveInt | None = 500


class Recipe(_Section):
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
        if self.data.row_length > self.config.max_position_embeddings:
            problems.append(
                f"data.row_length {self.data.row_length} exceeds the model's "
                f"max_position_embeddings {self.config.max_position_embeddings}"
            )
        if problems:
            raise UserError("The recipe has mistakes", got="; ".join(problems), do="correct these keys")

    @property
    def config(self) -> ModelConfig:
        """The model: the preset with the overrides in place, validated as a whole."""
        base = preset(self.model.preset)
        return base.replace(**self.model.overrides)


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
    """`train.steps=200`: the value in TOML's notation, or a bare word."""
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
    if section == "model" and name != "preset":
        target = target.setdefault("overrides", {})
        name = name.removeprefix("overrides.")
    target[name] = value


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
            parts.append(f"{place} = {detail['input']!r}: {detail['msg']}")
    return "; ".join(parts)
