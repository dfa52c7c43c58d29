"""What the optimizer writes, against AdamW by hand; and runs that stop and go on."""

import json
from collections.abc import Iterator
from copy import deepcopy
from itertools import count
from pathlib import Path

import pytest
import torch

from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.events import Event, Note, Saved, Step
from cavelight.spec.presets import preset
from cavelight.spec.recipe import Recipe, TrainSection
from cavelight.train import loop, step
from cavelight.train.optim import Optimizer, initialise, learning_rate
from cavelight.train.state import RunFolder, read_metrics
from cavelight.train.workers import Workers

RATES = TrainSection(steps=3, learning_rate=0.01, weight_decay=0.1, embedding_rate=5.0, head_rate=2.0, init_std=0.05)


def some_gradients(model: Transformer, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) * 0.01 for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_steps_equal_adamw_by_hand(dtype: torch.dtype) -> None:
    """Norms do not decay, embedding and head have their rates, narrow weights are rounded masters."""
    model = Transformer(preset("nano"), dtype)
    initialise(model, RATES.init_std, seed=0)
    masters = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(m), torch.zeros_like(m)) for name, m in masters.items()}
    optimizer = Optimizer(model, RATES)
    for t in (1, 2):
        parts = [some_gradients(model, 10 * t), some_gradients(model, 10 * t + 1)]
        total = {n: sum(g[i].double() for g in parts) for i, (n, _) in enumerate(model.named_parameters())}
        norm = torch.stack([g.square().sum() for g in total.values()]).sum().sqrt()
        clip = min(1.0, 0.5 / float(norm))
        for part in parts:
            optimizer.add(part)
        assert optimizer.step(RATES.learning_rate, clip_norm=0.5) == pytest.approx(float(norm), rel=1e-4)
        for name, w in masters.items():
            g, (m, v) = total[name] * clip, moments[name]
            rate = RATES.learning_rate * (5.0 if "embed_tokens" in name else 2.0 if "lm_head" in name else 1.0)
            decay = 0.0 if w.ndim == 1 else RATES.learning_rate * RATES.weight_decay
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g.square())
            w.mul_(1 - decay).sub_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(optimizer.masters[name].double(), masters[name], atol=2e-5, rtol=1e-4, msg=name)
        assert torch.equal(weight, optimizer.masters[name].to(dtype)), name


def test_a_gradient_that_lies_otherwise_in_memory_counts_the_same() -> None:
    written = []
    for transposed in (False, True):
        model = Transformer(preset("nano"))
        initialise(model, 0.05, seed=0)
        optimizer = Optimizer(model, RATES)
        gradients = some_gradients(model, 1)
        optimizer.add([g.mT.contiguous().mT if transposed and g.ndim > 1 else g for g in gradients])
        optimizer.step(0.01, 1.0)
        written.append(model.state_dict())
    for name, tensor in written[0].items():
        assert torch.equal(tensor, written[1][name]), name


def test_both_ways_down_end_at_the_final_rate() -> None:
    for decay in ("cosine", "linear"):
        recipe = RATES.model_copy(update={"decay": decay, "warmup_steps": 0, "final_learning_rate": 0.001})
        assert learning_rate(recipe, 0, 0.0) == pytest.approx(0.01)
        assert learning_rate(recipe, 9, 0.5) == pytest.approx(0.0055)
        assert learning_rate(recipe, 9, 1.0) == pytest.approx(0.001)
    assert learning_rate(RATES.model_copy(update={"warmup_steps": 0, "decay": "linear"}), 0, 0.25) == pytest.approx(
        0.75 * (0.01 - RATES.final_learning_rate) + RATES.final_learning_rate
    )


# Runs that stop and go on


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(12):
        (corpus / f"{n}.txt").write_text("\n".join(f"line {i * n} of file {n}" for i in range(60)))
    changes = {"preset": "nano"}
    data = {"corpus": str(corpus), "row_length": 32, "held_out_every": 3}
    train = {"steps": 6, "rows_per_step": 4, "rows_per_microbatch": 2, "warmup_steps": 2, "learning_rate": 3e-3}
    more = {"init_std": 0.05, "evaluate_every": 2, "save_every": None, "bias_speed": 0.01}
    return Recipe.build({"model": changes, "data": data, "train": train | more})


class Crash(BaseException):
    """Stands for a kill: nothing catches it."""


def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(1)

    def train_step(*arguments: object) -> step.StepResult:
        if next(calls) > steps:
            raise Crash
        return step.train_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(
    recipe: Recipe, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": dtype, "save_every": 3})})
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    loop.train(recipe, whole.path)
    with monkeypatch.context() as patched:
        crash_after(5, patched)
        with pytest.raises(Crash):
            loop.train(recipe, killed.path)
    result = loop.train(recipe, killed.path, resume=True)
    assert result.steps == 6 and not result.interrupted
    assert (whole.model / "model.safetensors").read_bytes() == (killed.model / "model.safetensors").read_bytes()

    def told(folder: RunFolder) -> Iterator[dict[str, object]]:
        for line in read_metrics(folder.metrics):
            yield {key: value for key, value in line.items() if "second" not in key}

    assert list(told(whole)) == list(told(killed))


def test_resuming_takes_new_rates_but_no_other_model_or_data(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path / "run")
    stored = recipe.model_dump()
    for change in ("model.hidden_size=32", "data.row_length=16", "train.seed=3"):
        with pytest.raises(UserError, match=change.partition("=")[0].split(".")[0]):
            loop.train(Recipe.build(stored, [change]), tmp_path / "run", resume=True)
    longer = Recipe.build(stored, ["train.steps=7", "train.weight_decay=0.5", "train.beta2=0.9"])
    assert loop.train(longer, tmp_path / "run", resume=True).steps == 7
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 8))
    assert sum(line.get("whole", False) for line in lines) == 1


def test_a_damaged_state_is_told(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path / "run")
    state = tmp_path / "run" / "state.pt"
    for content in (b"", b"not a state", state.read_bytes()[:5000]):
        state.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            loop.train(recipe, tmp_path / "run", resume=True)


def test_a_full_disk_while_saving_the_state_keeps_the_older_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full is a device that is always full."""
    loop.train(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "state.pt").read_bytes()

    def full(*arguments: object) -> None:
        with open("/dev/full", "wb") as handle:
            real({"a": torch.zeros(100_000)}, handle)

    real = torch.save
    monkeypatch.setattr(torch, "save", full)
    longer = Recipe.build(recipe.model_dump(), ["train.steps=7"])
    with pytest.raises(UserError, match="disk is full"):
        loop.train(longer, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_a_gradient_that_is_not_finite_changes_nothing_and_ends_a_run_in_the_end(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_LEFT_OUT", 3)
    models: list[Transformer] = []

    def spoil(model: Transformer, std: float, seed: int) -> None:
        initialise(model, std, seed)
        model.lm_head.weight.data.fill_(float("inf"))  # behind every router, so that all loads are sensible
        models.append(deepcopy(model))
        models.append(model)

    monkeypatch.setattr(loop, "initialise", spoil)
    heard: list[Event] = []
    with pytest.raises(UserError, match="not been finite for 3 steps"):
        loop.train(recipe, tmp_path / "run", heard.append)
    assert sum(isinstance(event, Note) and "left out" in event.text for event in heard) == 3
    assert not any(isinstance(event, Saved) for event in heard)
    assert [e.step for e in heard if isinstance(e, Step)] == [1, 2, 3]
    before, after = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_metrics_are_whole_lines_of_json(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert all(json.loads(line)["kind"] in ("step", "evaluated") for line in text.splitlines())


def test_workers_keep_the_order_and_begin_no_more_than_needed() -> None:
    threads, drawn = torch.get_num_threads(), []

    def items() -> Iterator[int]:
        for n in range(50):
            drawn.append(n)
            yield n

    results = Workers(2).map(lambda n: (n, torch.get_num_threads()), items())
    assert next(results) == (0, 1)
    assert len(drawn) <= 4
    assert [n for n, _ in results] == list(range(1, 50))
    assert torch.get_num_threads() == threads
