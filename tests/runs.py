"""Tiny runs for tests of the training loop: a recipe, a stand-in for a kill, and what makes two runs the same."""

import filecmp
import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cavelight.spec.recipe import Recipe
from cavelight.train import loop, step
from cavelight.train.checkpoints import folder_of, saved_steps
from cavelight.train.metrics import OF_THE_CLOCK
from cavelight.train.state import RunFolder, read_metrics

SMALL = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 8}
TRAIN = {"rows_per_step": 4, "rows_per_microbatch": 2, "warmup_steps": 2, "learning_rate": 3e-3, "init_std": 0.05}
LOOKS = {"evaluate_every": 3, "evaluate_bytes": 100, "save_every": 2, "bias_speed": 0.01, "sample_tokens": 3}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = tmp_path_factory.mktemp("corpus")
    for n in range(9):
        (corpus / f"{n}.txt").write_text("\n".join(f"line {i * n} of file {n}" for i in range(30)))
    return corpus


@pytest.fixture
def recipe(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Six steps."""
    monkeypatch.setattr(loop, "matmul_peak", lambda dtype: 1e9)  # it takes its time
    model = {"preset": "nano", "overrides": SMALL}
    data = {"corpus": str(corpus), "row_length": 16, "held_out_every": 5}
    return Recipe.build({"model": model, "data": data, "train": {"steps": 6, "dtype": "float32", **TRAIN, **LOOKS}})


def changed(recipe: Recipe, **keys: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=keys)})


class Crash(BaseException):
    """Stands for a kill: nothing catches it."""


def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(1)

    def train_step(*arguments: Any, **more: Any) -> step.StepResult:
        if next(calls) > steps:
            raise Crash
        return step.train_step(*arguments, **more)

    monkeypatch.setattr(loop, "train_step", train_step)


def lines(run: Path) -> list[dict[str, Any]]:
    """The log without times."""
    told = read_metrics(RunFolder(run).metrics)
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in told]


def assert_same(one: Path, other: Path) -> None:
    """Saves, exports and logs of two runs, to the bit."""
    folders = [RunFolder(run) for run in (one, other)]
    assert saved_steps(folders[0].saves) == saved_steps(folders[1].saves)
    newest = [folder_of(folder.saves, saved_steps(folder.saves)[-1]) for folder in folders]
    tensors = [file.name for file in newest[0].glob("*.safetensors")]
    assert filecmp.cmpfiles(*newest, tensors, shallow=False)[0] == tensors
    files = [file.name for file in folders[0].model.iterdir()]
    assert sorted(filecmp.cmpfiles(folders[0].model, folders[1].model, files, shallow=False)[0]) == sorted(files)
    progress = [json.loads((folder / "state.json").read_text())["progress"] for folder in newest]
    assert progress[0] | {"seconds": 0, "log": 0} == progress[1] | {"seconds": 0, "log": 0}
    assert lines(one) == lines(other)
