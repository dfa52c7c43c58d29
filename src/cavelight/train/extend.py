"""A longer context in phases, as DeepSeek-V3 learnt its own: YaRN, and some training on long rows (V3 report, 4.3).

A phase is an ordinary run in a folder of its own: it begins with the weights of the one before and may be stopped,
resumed and looked at like any other.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cavelight.disk import checkpoint_folder
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig, Yarn
from cavelight.spec.events import Event, Note
from cavelight.spec.recipe import Recipe
from cavelight.spec.sections import DataSection
from cavelight.train.loop import Result, train
from cavelight.train.origin import Origin, changed_texts, newest_step
from cavelight.train.prepare import read_corpora
from cavelight.train.state import RunFolder, read_metrics
from cavelight.weights.files import abbreviated

STEPS = 1000  # of each phase
ELSEWHERE = "extend into another folder (--out), or move this one away"
RATE_SHARE = 7.3e-6 / 2.2e-4  # of the learning rate's peak in pre-training


def extend(
    run: Path,
    lengths: Sequence[int],
    out: Path,
    changes: Sequence[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Result]:
    """Extend a run's model, or a checkpoint's, to each of `lengths` tokens in turn; phases go to `out`/32k and so on.

    changes: `section.key=value` for the recipe of every phase. A phase that is through stands; one that was interrupted
    is gone on with, and the later ones wait for it. Raises UserError for lengths that do not grow, and for a phase that
    began with other weights or is through by another recipe.
    """
    _check(ModelConfig.read(checkpoint_folder(run)), lengths)
    results: list[Result] = []
    source = run
    for length in lengths:
        folder = RunFolder(out / length_name(length))
        result = _finished(folder)
        if folder.holds_a_run:
            _check_weights(folder, source)
        if result is None:
            result = _train(source, length, folder, changes, on_event)
        else:
            _check_recipe(folder, phase(source, length, changes))
            on_event(Note(f"{folder.path} is extended to {length:,} positions already"))
        results.append(result)
        if result.interrupted:
            break
        source = folder.path
    return results


def _train(
    source: Path, length: int, folder: RunFolder, changes: Sequence[str], on_event: Callable[[Event], None]
) -> Result:
    if folder.holds_a_run:
        recipe = Recipe.build(folder.read_recipe().model_dump(), changes)
        on_event(Note(f"{folder.path} holds this phase already: going on with it"))
    else:
        recipe = phase(source, length, changes)
        yarn = recipe.config.rope_scaling
        assert yarn is not None
        original = yarn.original_max_position_embeddings
        on_event(Note(f"To {length:,} positions: YaRN with factor {yarn.factor:g} from {original:,}"))
        for sentence in changed_texts(source, read_corpora(recipe.data)):
            on_event(Note(sentence))
    return train(recipe, folder.path, on_event, resume=folder.holds_a_run)


def _finished(folder: RunFolder) -> Result | None:
    """What a run that is through came to: its last look took in all held-out text. None for any other."""
    steps = looks = None
    for line in read_metrics(folder.metrics):
        if line["kind"] == "step":
            steps, looks = line, None
        elif line["kind"] == "evaluated" and line["whole"]:
            looks = line
    if steps is None or looks is None:
        return None
    numbers = (steps["step"], steps["tokens"], steps["seconds"], looks["bits_per_byte"])
    return Result(folder.path, folder.model, *numbers, interrupted=False)


def phase(source: Path, length: int, changes: Sequence[str] = ()) -> Recipe:
    """The recipe that extends the model in `source` to `length` positions: YaRN, and training at that row length.

    As in the report: 1000 steps at a constant rate, that of pre-training's end (7.3e-6 for a peak of 2.2e-4), with as
    many tokens a step as before; lambda of the MTP loss at its late value, and routing biases at rest. The YaRN factor
    counts from the original length, also when a model is extended again. Data and tokenizer are the source's own.
    """
    config = ModelConfig.read(checkpoint_folder(source))
    yarn = config.rope_scaling
    if yarn is None:
        yarn = Yarn(factor=1, original_max_position_embeddings=config.max_position_embeddings, mscale_all_dim=1.0)
    original = yarn.original_max_position_embeddings
    folder = RunFolder.of(source)
    before = folder.read_recipe() if folder.recipe.is_file() else Recipe(data=DataSection(row_length=original))
    scaling = yarn.model_dump() | {"factor": length / original}
    values = {
        "model": {
            "weights": str(source),
            "overrides": {"rope_scaling": scaling, "max_position_embeddings": length},
        },
        "data": before.data.model_dump() | {"row_length": length, "tokenizer": str(checkpoint_folder(source))},
        "train": before.train.model_dump() | _training(before, length, first=not _is_phase(before)),
    }
    return Recipe.build(values, changes)


def length_name(length: int) -> str:
    """32768 as 32k, 1000 as 1000."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _is_phase(recipe: Recipe) -> bool:
    """Whether `phase` made this recipe. YaRN alone does not tell: pre-training may carry it with a factor of 1."""
    return recipe.model.weights is not None and "rope_scaling" in recipe.model.overrides


def _training(before: Recipe, length: int, first: bool) -> dict[str, Any]:
    """The keys of [train] in which a phase differs from the run before; `first`: that was not such a phase itself."""
    train = before.train
    return {
        "steps": STEPS,
        "minutes": None,
        "rows_per_step": max(1, train.rows_per_step * before.data.row_length // length),
        "rows_per_microbatch": 1,
        "ramp_from_rows": None,
        "learning_rate": train.learning_rate * (RATE_SHARE if first else 1.0),
        "warmup_steps": 0,
        "schedule": [{"share": 1.0, "to": 1.0}],
        "mtp_weight": train.mtp_weight_late,
        "bias_speed": 0.0,
    }


def _check_weights(folder: RunFolder, source: Path) -> None:
    """UserError if `source` was trained further since the phase in `folder` began with it."""
    origin, now = Origin.read(folder), newest_step(source)
    began = origin.weights_step if origin else None
    if began is not None and now is not None and began != now:
        raise UserError(
            f"{folder.path} is a phase of other weights",
            got=f"{source} after step {began:,}; it is at step {now:,} now",
            do=ELSEWHERE,
        )


def _check_recipe(folder: RunFolder, asked: Recipe) -> None:
    """UserError if the phase in `folder` was trained by another recipe."""
    made, wanted = _keys(folder.read_recipe()), _keys(asked)
    other = [key for key in sorted(made | wanted) if made.get(key) != wanted.get(key)]
    if other:
        raise UserError(
            f"{folder.path} is extended already, by another recipe",
            got=abbreviated([f"{key} = {made.get(key)!r} there, {wanted.get(key)!r} asked for" for key in other], 5),
            do=f"ask for what it has (--set); or, to have both, {ELSEWHERE}",
        )


def _keys(recipe: Recipe) -> dict[str, Any]:
    """All keys by their dotted names, as --set knows them."""
    values = recipe.model_dump()
    values["model"] |= values["model"].pop("overrides")
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


def _check(config: ModelConfig, lengths: Sequence[int]) -> None:
    reached = config.max_position_embeddings
    for length in lengths:
        if length <= reached:
            raise UserError(
                "A context is extended to more than it has",
                got=f"{length:,} tokens after {reached:,}",
                do="name longer contexts, in growing order",
            )
        reached = length
