"""A longer context in phases, and what context is worth by position."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cavelight.cli.evaluation import held_out_tokens
from cavelight.data.corpus import read_corpus
from cavelight.data.tokenising import tokenize
from cavelight.data.tokenizer import Tokenizer, train_tokenizer
from cavelight.errors import UserError
from cavelight.see.context import draw_by_position
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Note, Step
from cavelight.spec.recipe import Recipe
from cavelight.spec.sections import TrainSection
from cavelight.train.evaluate import loss_by_position
from cavelight.train.extend import extend, length_name, phase
from cavelight.train.loop import train
from cavelight.train.state import RunFolder

from .reference.tiny import tiny
from .run_models import random_model

TEXT = "".join(f"the {n * n % 97} birds sat on {n % 7} fences\n" for n in range(3000))
ORIGINAL = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, whose original context is 32 tokens."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": ORIGINAL}
    recipe = Recipe.build(
        {
            "model": {"preset": "nano", "overrides": sizes},
            "data": {"corpus": str(folder / "text.txt"), "row_length": ORIGINAL, "fim_rate": 0.0},
            "train": {"steps": 2, "rows_per_step": 8, "init_std": 0.06, "learning_rate": 2.2e-3},
        }
    )
    train(recipe, folder / "run")
    return folder / "run"


def test_a_phase_is_the_reports(run: Path) -> None:
    recipe = phase(run, 64)
    yarn = recipe.config.rope_scaling
    assert yarn is not None
    assert (yarn.factor, yarn.original_max_position_embeddings) == (2.0, ORIGINAL)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim) == (32.0, 1.0, 1.0, 1.0)
    assert recipe.config.max_position_embeddings == recipe.data.row_length == 64
    settings = recipe.train
    assert settings.learning_rate == pytest.approx(7.3e-5)
    assert [stage.to for stage in settings.schedule] == [1.0]
    assert (settings.steps, settings.warmup_steps, settings.rows_per_step, settings.bias_speed) == (1000, 0, 4, 0.0)
    assert settings.mtp_weight == 0.1


@pytest.mark.parametrize("is_run", [True, False], ids=["pre-training with a factor of 1", "a checkpoint of its own"])
def test_a_source_with_yarn_is_no_earlier_phase(run: Path, tmp_path: Path, is_run: bool) -> None:
    yarn = {"factor": 1.0, "original_max_position_embeddings": ORIGINAL, "mscale_all_dim": 1.0}
    before = RunFolder(run).read_recipe().model_dump()
    before["model"]["overrides"] |= {"rope_scaling": yarn}
    recipe, source = Recipe.build(before), RunFolder(tmp_path / "source")
    folder = source.model if is_run else source.path
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(recipe.config.to_hf()), encoding="utf-8")
    if is_run:
        source.write_recipe(recipe)
    peak = recipe.train.learning_rate if is_run else TrainSection().learning_rate
    assert phase(source.path, 64).train.learning_rate == pytest.approx(peak * 7.3e-6 / 2.2e-4)


def test_a_runs_exported_model_has_its_recipe(run: Path) -> None:
    whole, model = phase(run, 64), phase(run / "model", 64)
    assert model.train == whole.train
    assert model.data == whole.data
    assert RunFolder.of(run / "saves") == RunFolder(run / "saves")


def test_phases_stand_on_one_another_and_are_done_once(run: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    changes = ["train.steps=2", "train.evaluate_bytes=2000"]
    results = extend(run, [64, 128], tmp_path, changes, told.append)
    assert [result.out for result in results] == [tmp_path / "64", tmp_path / "128"]
    configs = [ModelConfig.read(result.model) for result in results]
    assert [config.max_position_embeddings for config in configs] == [64, 128]
    assert [config.rope_scaling.factor for config in configs if config.rope_scaling] == [2.0, 4.0]
    recipes = [RunFolder(result.out).read_recipe() for result in results]
    assert [recipe.model.weights for recipe in recipes] == [str(run), str(tmp_path / "64")]
    assert recipes[0].train.learning_rate == recipes[1].train.learning_rate
    assert recipes[1].train.rows_per_step == 2
    steps = [event for event in told if isinstance(event, Step)]
    assert [step.step for step in steps] == [1, 2, 1, 2]
    again: list[Event] = []
    repeated = extend(run, [64, 128], tmp_path, changes, again.append)
    assert [event.text.partition(" is ")[2] for event in again if isinstance(event, Note)] == [
        "extended to 64 positions already",
        "extended to 128 positions already",
    ]
    assert [result.bits_per_byte for result in repeated] == [result.bits_per_byte for result in results]


def test_a_phase_that_is_through_by_another_recipe_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    extend(tmp_path / "run", [64], tmp_path / "out", ["train.steps=1"])
    with pytest.raises(UserError, match=r"out/64 is extended already.*train.steps = 1 there, 2 asked for"):
        extend(tmp_path / "run", [64], tmp_path / "out", ["train.steps=2"])
    with pytest.raises(UserError, match=r"model.rms_norm_eps = None there, 0.1 asked for"):
        extend(tmp_path / "run", [64, 128], tmp_path / "out", ["train.steps=1", "model.rms_norm_eps=0.1"])


def test_a_phase_of_weights_that_were_trained_further_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name, stop_at in (("through", 9), ("stopped", 1)):

        def stop(event: Event, step: int = stop_at) -> None:
            if isinstance(event, Step) and event.step == step:
                signal.raise_signal(signal.SIGINT)

        extend(tmp_path / "run", [64], tmp_path / name, ["train.steps=2"], stop)
    before = RunFolder(tmp_path / "run").read_recipe()
    longer = before.model_copy(update={"train": before.train.model_copy(update={"steps": 3})})
    train(longer, tmp_path / "run", resume=True)
    for name in ("through", "stopped"):
        with pytest.raises(UserError, match=rf"{name}/64 is a phase of other weights.*after step 2; it is at step 3"):
            extend(tmp_path / "run", [64], tmp_path / name, ["train.steps=2"])


def test_a_text_that_has_grown_since_is_said_aloud(run: Path, tmp_path: Path) -> None:
    """A lone file is cut by its size, so that what was learnt from may be held out now."""
    tokenizer, before, changes = Tokenizer.load(run / "model"), RunFolder(run).read_recipe(), ["train.steps=1"]
    own = str(tmp_path / "text.txt")
    shutil.copyfile(run.parent / "text.txt", own)
    recipe = before.model_copy(update={"data": before.data.model_copy(update={"corpus": own})})
    train(recipe, tmp_path / "own")

    def said() -> list[str]:
        told: list[Event] = []
        held_out_tokens(tmp_path / "own", None, tokenizer, told.append)
        held_out_tokens(tmp_path / "own" / "model", own, tokenizer, told.append)
        extend(tmp_path / "own", [64], tmp_path / f"out {len(list(tmp_path.iterdir()))}", changes, told.append)
        return [event.text for event in told if isinstance(event, Note) and "may have been trained on" in event.text]

    os.utime(own, (0, 0))
    assert said() == []
    (tmp_path / "text.txt").write_text(TEXT + TEXT[:9000], encoding="utf-8")
    (grown, by_path, extended) = said()
    assert grown == by_path == extended
    assert grown.startswith(f"{own} is not the text")


def test_an_interrupted_phase_is_gone_on_with(run: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    changes = ["train.steps=4"]
    (first,) = extend(run, [64, 128], tmp_path / "stopped", changes, stop)
    assert first.interrupted
    assert not (tmp_path / "stopped" / "128").exists()
    stopped = extend(run, [64], tmp_path / "stopped", changes)
    straight = extend(run, [64], tmp_path / "straight", changes)
    assert [result.bits_per_byte for result in stopped] == [result.bits_per_byte for result in straight]


def test_a_phase_begins_with_the_weights_before_it(run: Path, tmp_path: Path) -> None:
    """At a learning rate of zero nothing but the positions' stretch differs."""
    zero = ["train.steps=1", "train.learning_rate=1e-30", "train.weight_decay=0.0"]
    (result,) = extend(run, [64], tmp_path, zero)
    (before,), (after,) = (list(folder.glob("*.safetensors")) for folder in (run / "model", result.model))
    told, kept = load_file(after), load_file(before)
    assert told.keys() == kept.keys()
    assert all(torch.equal(told[name], kept[name]) for name in kept)


def test_a_context_only_grows(run: Path, tmp_path: Path) -> None:
    for lengths in ([ORIGINAL], [64, 64], [128, 64]):
        with pytest.raises(UserError, match="extended to more than it has"):
            extend(run, lengths, tmp_path)


def test_names_of_lengths() -> None:
    assert [length_name(length) for length in (64, 1000, 32_768, 131_072)] == ["64", "1000", "32k", "128k"]


def test_buckets_hold_every_prediction_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer([TEXT], 300)
    store = tokenize(read_corpus(str(tmp_path / "text.txt")).train, tokenizer, tmp_path)
    model = random_model(tiny(vocab_size=300, max_position_embeddings=1 << 20))
    buckets = loss_by_position(model, tokenizer, store, 100, rows=3)
    assert [(bucket.first, bucket.last) for bucket in buckets] == [(1, 15), (16, 31), (32, 63), (64, 100)]
    assert [bucket.tokens for bucket in buckets] == [45, 48, 111 - 15, 111]
    nats = text_bytes = 0.0
    for start in (0, (len(store) - 101) // 2, len(store) - 101):
        tokens_T = torch.tensor(store.tokens_N[start : start + 101].astype("int64"))
        with torch.inference_mode():
            logp_TV = model.logits(tokens_T[:-1]).log_softmax(-1)
        nats -= float(logp_TV[torch.arange(100), tokens_T[1:]].sum())
        labels = [token for token in tokens_T[1:].tolist() if token not in tokenizer.control.values()]
        text_bytes += len(tokenizer.decode(labels).encode())
    assert sum(bucket.nats for bucket in buckets) == pytest.approx(nats, rel=1e-4)
    assert sum(bucket.bytes for bucket in buckets) == text_bytes
    draw_by_position(buckets, tmp_path / "context.png", "What context is worth", ["tiny"])
    assert (tmp_path / "context.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="shorter than one context"):
        loss_by_position(model, tokenizer, store, 1 << 19)
    with pytest.raises(UserError, match="does not reach so far"):
        loss_by_position(random_model(tiny(vocab_size=300)), tokenizer, store, 5000)
