"""What a comparison must not do: mix texts, count what the losses do not, take overall imbalance for specialisation."""

import json
import sys
from pathlib import Path

import pytest

from cavelight.errors import UserError
from cavelight.experiment import balance, fp8, runs, specialisation
from cavelight.experiment.catalogue import CATALOGUE
from cavelight.experiment.runs import FAILURE, FOUND, Job, go_through
from cavelight.experiment.study import Outcome, Run, Study
from cavelight.model.router import is_group_limited
from cavelight.spec.events import Event
from cavelight.train.state import RunFolder

QUICK = ["model.preset=nano", "train.steps=2", "data.row_length=32"]


def silent(name: str, event: Event | None) -> None:
    pass


@pytest.fixture
def study(tmp_path: Path) -> Study:
    text = "".join(f"def twice_{n}(x): return {n} * x\n" for n in range(40))
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.py").write_text(text)
    return Study.read("mtp", [*QUICK, f"data.corpus={tmp_path / 'text'}"])


def finished(study: Study, folder: Path, seeds: int, texts: dict[str, str]) -> None:
    """Runs that are there already, each of a text by its label, else of the same."""
    for variant in study.variants:
        for seed in range(seeds):
            label = f"{variant.key}-{seed}"
            place = RunFolder(folder / study.name / label)
            place.model.mkdir(parents=True)
            place.write_recipe(variant.seeded(seed))
            (place.path / FOUND).write_text(json.dumps({"bits_per_byte": 1.0, "text": [texts.get(label, "a")]}))


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_choice_is_not_limited_to_groups(name: str) -> None:
    assert not any(is_group_limited(variant.config) for variant in Study.read(name, []).variants)


def test_runs_of_other_text_are_not_mixed(study: Study, tmp_path: Path) -> None:
    finished(study, tmp_path / "same", 2, {})
    assert len(go_through(study, 2, tmp_path / "same", silent).runs["off"]) == 2
    finished(study, tmp_path / "other", 2, {"off-1": "b"})
    with pytest.raises(UserError, match="other text in off-1 than in the rest"):
        go_through(study, 2, tmp_path / "other", silent)


def test_a_process_that_dies_at_once_is_told(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WORKER", (sys.executable, "-c", "raise SystemExit(3)"))
    recipe = study.variants[0].seeded(0)
    big = recipe.model_copy(update={"train": recipe.train.model_copy(update={"init_stds": {"x" * (1 << 18): 1.0}})})
    jobs = [Job("mtp", "off-0", big, tmp_path / "run")]  # more than a pipe holds
    with pytest.raises(UserError, match="off-0: it ended with 3"):
        runs._Pool(jobs, 1, silent).run()


def test_a_traceback_goes_into_a_file(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WORKER", (sys.executable, "-c", "import sys; sys.stdin.read(); 1 / 0"))
    with pytest.raises(UserError, match="3 runs failed") as caught:
        go_through(study, 1, tmp_path / "runs", silent, cores=1)
    told = str(caught.value)
    assert told.count("ZeroDivisionError: division by zero") == 3 and "Traceback" not in told
    assert "Traceback" in (tmp_path / "runs/mtp/off-0" / FAILURE).read_text()


def run_of(folder: Path, losses: list[float], counts: list[list[int]], **found: object) -> Run:
    folder.mkdir(parents=True)
    lines = [
        {"kind": "step", "step": n, "tokens": n, "loss": loss, "max_vio": [1.0], "counts": [counts[n % len(counts)]]}
        for n, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(0, RunFolder(folder), {"bits_per_byte": 1.0, **found})


def test_chance_of_single_steps_cancels_in_the_lasting_load(tmp_path: Path) -> None:
    to_and_fro = run_of(tmp_path / "a", [1.0] * 20, [[4, 0], [0, 4]])
    one_sided = run_of(tmp_path / "b", [1.0] * 20, [[3, 1]])
    assert balance.lasting_vio(to_and_fro) == 0 and balance.lasting_vio(one_sided) == 0.5


def test_an_expert_that_is_always_busy_is_no_specialist(tmp_path: Path) -> None:
    def loads(*of_kinds: list[float]) -> dict[str, object]:
        return {str(n): {"bits_per_byte": 1.0, "loads": [load]} for n, load in enumerate(of_kinds)}

    uneven = run_of(tmp_path / "a", [1.0], [[1, 1]], kinds=loads([1.5, 0.5], [1.5, 0.5]))
    special = run_of(tmp_path / "b", [1.0], [[1, 1]], kinds=loads([1.5, 0.5], [0.5, 1.5]))
    assert specialisation.unevenness(uneven) == specialisation.unevenness(special) == 0.5
    assert specialisation.special(uneven) == 0 and specialisation.special(special) == 0.5


def test_fp8_is_held_against_bf16_too(tmp_path: Path) -> None:
    losses = {"float32": 2.0, "fp8": 2.02, "bf16": 2.04, "order": 2.0}
    made = {key: [run_of(tmp_path / key, [loss] * 20, [[1, 1]])] for key, loss in losses.items()}
    told = fp8.tell(Outcome(Study.read("fp8", []), made)).verdict
    assert told[-1] == "Fp8 against bf16: −0.980 % at the end; the largest error is 0.98 %."
