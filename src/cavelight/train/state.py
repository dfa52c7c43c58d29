"""What a run keeps on disk: the resolved recipe, a line of metrics a step, the state to go on from, the model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from cavelight.disk import clear_disk_errors, file_beside
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.events import Evaluated, Step
from cavelight.spec.recipe import Recipe
from cavelight.train.balance import routers
from cavelight.train.optim import Optimizer


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> Path:
        return self.path / "state.pt"

    @property
    def model(self) -> Path:
        """A Hugging Face directory: what `generate`, `eval` and other programs open."""
        return self.path / "model"

    def write_recipe(self, recipe: Recipe) -> None:
        with file_beside(self.recipe) as scratch:
            scratch.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def read_recipe(self) -> Recipe:
        try:
            return Recipe.build(json.loads(self.recipe.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} is not a run that can go on", got=str(error), do="name the folder that train wrote"
            ) from error


@dataclass
class Progress:
    """How far a run has come. `seconds` is time spent in the loop, over all its sessions."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_state(folder: RunFolder, model: Transformer, optimizer: Optimizer, progress: Progress) -> None:
    biases = [router.e_score_correction_bias for router in routers(model)]
    # Given a path instead of a handle, torch would hide a full disk's error number.
    with file_beside(folder.state) as scratch, open(scratch, "wb") as handle:
        torch.save({"optimizer": optimizer.state(), "biases": biases, "progress": asdict(progress)}, handle)


def load_state(folder: RunFolder, model: Transformer, optimizer: Optimizer) -> Progress:
    try:
        state = torch.load(folder.state, weights_only=True)
        optimizer_state, biases, progress = state["optimizer"], state["biases"], Progress(**state["progress"])
    except FileNotFoundError as error:
        raise UserError(
            f"{folder.path} holds no saved state", why="the run ended before its first save", do="start it anew"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, UnpicklingError) as error:
        raise UserError(
            f"{folder.state} is damaged",
            got=str(error).partition("\n")[0],
            do="delete the folder and start the run anew",
        ) from error
    optimizer.load_state(optimizer_state)
    for router, bias_E in zip(routers(model), biases, strict=True):
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(bias_E)
    return progress


def check_resumable(before: Recipe, now: Recipe) -> None:
    """Raise UserError if `now` differs from the recipe of the saved run in what cannot change while it is under way."""
    fixed = {"seed", "init_std", "rows_per_step"}
    changed = [section for section in ("model", "data") if getattr(before, section) != getattr(now, section)]
    changed += [f"train.{key}" for key in sorted(fixed) if getattr(before.train, key) != getattr(now.train, key)]
    if changed:
        raise UserError(
            "A run goes on with the model and the data that it began with",
            got=f"another {', '.join(changed)}",
            do="change only other keys of train, or start a new run",
        )


class MetricsLog:
    """metrics.jsonl: one line a step or evaluation.

    Going on from a step drops what was written after it, and an evaluation that was the run's last.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in _lines(path) if (read := json.loads(line))["step"] <= step and not read.get("whole")]
        with file_beside(path) as scratch:
            scratch.write_text("".join(kept), encoding="utf-8")
        self.path = path

    def write(self, event: Step | Evaluated, **more: Any) -> None:
        values = {"kind": type(event).__name__.lower(), **asdict(event), **more}
        with clear_disk_errors(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a last line cut off by a crash is left out."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
