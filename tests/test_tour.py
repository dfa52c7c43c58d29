"""The whole circle in small, through the command line: train, stop, go on, evaluate, generate, and the tour."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import cavelight
from cavelight.cli.main import app

MODULES = (
    "abc",
    "bisect",
    "cmd",
    "code",
    "codeop",
    "colorsys",
    "copy",
    "fnmatch",
    "glob",
    "heapq",
    "keyword",
    "pprint",
)
CHANGES = (
    "model.preset=nano",
    "data.row_length=64",
    "train.steps=3",
    "train.rows_per_step=2",
    "train.warmup_steps=0",
    "train.evaluate_every=2",
    "train.dtype=float32",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus, and an exported model of the tour's."""
    world = tmp_path_factory.mktemp("world")
    (world / "corpus").mkdir()
    for module in MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib"), f"{module}.py"), world / "corpus")
    return world


def call(world: Path, *arguments: str) -> Result:
    env = {"CAVELIGHT_CACHE": str(world / "cache"), "COLUMNS": "100"}
    return CliRunner().invoke(app, list(arguments), env=env, catch_exceptions=False)


def changes(world: Path) -> list[str]:
    return [part for change in (*CHANGES, f"data.corpus={world / 'corpus'}") for part in ("--set", change)]


@pytest.fixture(scope="module")
def tour(world: Path) -> Result:
    return call(world, "demo", "--out", str(world / "demo"), *changes(world), "--json")


def lines(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_tour_measures_what_it_promises(world: Path, tour: Result) -> None:
    assert tour.exit_code == 0, tour.output
    found = lines(tour)[-1]
    written = json.loads((world / "demo" / "demo.json").read_text())
    assert found == {"kind": "result", **written}
    assert 0 < written["xz"]["seen"] < written["xz"]["alone"] < 8
    assert 0 < written["bits_per_byte"] < 10
    speed = written["speed"]
    assert speed["identical"]
    assert speed["with_drafts"]["new_tokens"] == speed["without"]["new_tokens"] > 0
    assert speed["without"]["rounds"] == 0 < speed["with_drafts"]["rounds"]
    assert len(speed["acceptance"]) == 1
    for path in written["files"].values():
        assert Path(path).exists()


def test_the_tour_goes_on_with_a_run_that_is_there(world: Path, tour: Result) -> None:
    assert tour.exit_code == 0
    shown = call(world, "demo", "--out", str(world / "demo"))
    assert shown.exit_code == 0, shown.output
    for part in (
        "going on with it",
        "this model",
        "xz -9e",
        "with drafts",
        "the same with drafts and without",
        "report/index.html",
    ):
        assert part in shown.output
    assert "step 3/3" not in shown.output  # nothing was trained again


def test_eval_reads_the_runs_own_corpus(world: Path, tour: Result) -> None:
    known = lines(tour)[-1]["bits_per_byte"]
    shown = call(world, "eval", str(world / "demo"), "--json")
    assert lines(shown)[-1]["bits_per_byte"] == pytest.approx(known, abs=1e-6)


def test_generate_and_its_json_agree(world: Path, tour: Result) -> None:
    ask = ["generate", str(world / "demo"), "-p", "def f(", "--max-new-tokens", "12"]
    said = lines(call(world, *ask, "--json"))[-1]
    assert 0 < said["stats"]["new_tokens"] <= 12
    shown = call(world, *ask)
    assert shown.stdout == said["text"] + "\n"
    assert f"{said['stats']['new_tokens']} tokens" in shown.stderr


def test_generate_reads_its_prompt_from_a_pipe(world: Path, tour: Result) -> None:
    env = {"CAVELIGHT_CACHE": str(world / "cache")}
    ask = ["generate", str(world / "demo"), "--max-new-tokens", "3", "--json"]
    shown = CliRunner().invoke(app, ask, env=env, input="import os")
    assert json.loads(shown.stdout)["prompt"] == "import os"


def test_chat_answers_each_line(world: Path, tour: Result) -> None:
    ask = ["chat", str(world / "demo"), "--max-new-tokens", "4", "--temperature", "0", "--json"]
    shown = CliRunner().invoke(app, ask, input="hello\n\n/new\nhello\n/exit\nnever read\n")
    first, second = lines(shown)
    assert first["answer"] == second["answer"]
    assert first["stats"]["prompt_tokens"] == second["stats"]["prompt_tokens"]  # /new forgot the first exchange


def test_the_same_from_python(world: Path, tour: Result, tmp_path: Path) -> None:
    model, tokenizer = cavelight.load(world / "demo")
    prompt = tokenizer.encode("class A")
    tokens = cavelight.generate_tokens(model, prompt, max_new_tokens=8)
    assert tokens == cavelight.generate_tokens(model, prompt, max_new_tokens=8, mtp=False)
    assert "".join(cavelight.generate(model, tokenizer, prompt, max_new_tokens=8)) == tokenizer.decode(tokens)
    cavelight.save(model, tokenizer, tmp_path / "export")
    again, _ = cavelight.load(tmp_path / "export")
    tokens_T = torch.tensor(prompt)
    assert torch.equal(model.logits(tokens_T), again.logits(tokens_T))
    assert cavelight.read_config(tmp_path / "export") == again.config


def test_a_run_is_never_overwritten(world: Path, tour: Result) -> None:
    shown = call(world, "train", "demo", "--out", str(world / "demo"), *changes(world))
    assert shown.exit_code == 2
    assert "already holds a run" in shown.stderr


def test_train_goes_on_with_more_steps(world: Path) -> None:
    out = world / "run"
    first = call(world, "train", "demo", "--out", str(out), *changes(world), "--json")
    assert lines(first)[-1]["steps"] == 3
    more = call(world, "train", "--resume", str(out), "--set", "train.steps=5", "--json")
    steps = [line["step"] for line in lines(more) if line["kind"] == "step"]
    assert steps == [4, 5]
    assert lines(more)[-1]["interrupted"] is False


def test_ctrl_c_saves_and_says_how_to_go_on(world: Path) -> None:
    out = world / "stopped"
    command = [sys.executable, "-m", "cavelight", "train", "demo", "--out", str(out), *changes(world), "--json"]
    env = os.environ | {"CAVELIGHT_CACHE": str(world / "cache")}
    heard = []
    with subprocess.Popen([*command, "--set", "train.steps=100000"], env=env, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            heard.append(json.loads(line))
            if heard[-1]["kind"] == "step":
                run.send_signal(signal.SIGINT)
                break
        heard += [json.loads(line) for line in run.stdout]
    assert run.returncode == 130
    assert f"cavelight train --resume {out}" in heard[-2]["text"]
    assert heard[-1]["interrupted"] is True
    more = call(world, "train", "--resume", str(out), "--set", f"train.steps={heard[-1]['steps'] + 1}", "--json")
    assert lines(more)[-1]["steps"] == heard[-1]["steps"] + 1
