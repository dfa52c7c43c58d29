"""The command line as its users meet it: help, plan, mistakes, exit codes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import cavelight
from cavelight.cli.main import app
from cavelight.cli.screen import telling
from cavelight.errors import UserError

COMMANDS = ("demo", "train", "eval", "generate", "chat", "bench", "plan")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_help_names_every_command() -> None:
    shown = call("--help")
    assert shown.exit_code == 0
    assert set(COMMANDS) <= set(re.findall(r"^│ (\w+)", shown.output, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(command: str) -> None:
    shown = call(command, "--help")
    assert shown.exit_code == 0
    assert "--json" in shown.output


def test_the_readme_speaks_of_commands_and_names_that_exist() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^cavelight .*", readme, re.MULTILINE)]
    assert {words[1] for words in lines} >= set(COMMANDS) - {"demo"}
    for _, command, *words in lines:
        explained = call(command, "--help").output
        for option in (word for word in words if word.startswith("-")):
            assert f" {option} " in explained, f"{command} {option}"
    for name in re.findall(r"\bcavelight\.(\w+)\(", readme):
        assert name in cavelight.__all__
    for target in re.findall(r"\bmake (\w+) +#", readme):
        assert f"\n{target}:" in (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")


def test_version() -> None:
    assert call("--version").output == f"cavelight {cavelight.__version__}\n"


def test_plan_shows_the_counts() -> None:
    shown = call("plan", "deepseek-v3")
    assert shown.exit_code == 0
    assert "671,026,419,200" in shown.output
    assert "70,272 B" in shown.output


def test_plan_as_json() -> None:
    shown = call("plan", "deepseek-v3", "--context", "128k", "--json")
    found = json.loads(shown.output)
    assert found["parameters"]["total"] == 671_026_419_200
    assert found["context"] == 131072
    assert found["cache_bytes"]["mla"] == 131072 * 70272


def test_plan_reads_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cavelight.preset("deepseek-v2-lite").to_hf()))
    shown = call("plan", str(tmp_path), "--json")
    assert json.loads(shown.output)["parameters"]["total"] == 15_706_484_224


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "deepseek-v4"], "There is no preset 'deepseek-v4'."),
        (["plan", "nano", "--context", "lots"], "That is no number of tokens."),
        (["train"], "Name either a recipe or a run to go on with."),
        (["train", "demo", "--resume", "somewhere"], "Name either a recipe or a run to go on with."),
        (["train", "no-such-recipe"], "There is no such recipe."),
        (["train", "demo", "--set", "train.stepps=3"], "The recipe has mistakes."),
        (
            ["train", "demo", "--set", "train.minutes=inf"],
            "The recipe has mistakes. Got: train.minutes = inf: Input should be a",
        ),
        (
            ["train", "demo", "--set", "train.seed=1180591620717411303424"],
            "The recipe has mistakes. Got: train.seed = 1180591620717411303424",
        ),
        (["train", "demo", "--set", "train.init_stds={norm = 1.0}"], "The recipe has mistakes. Got: train.init_stds"),
        (
            ["train", "demo", "--set", "train.schedule=[{share = 0.5, to = 1.0}]"],
            "The recipe has mistakes. Got: train: the schedule's shares",
        ),
        (["train", "demo", "--set", "data.corpus="], "The recipe has mistakes. Got: data.corpus"),
        (["train", "demo", "--set", "data.corpus=[{corpus = ''}]"], "The recipe has mistakes. Got: data.corpus"),
        (["train", "demo", "--set", "data.tokenizer=''"], "The recipe has mistakes. Got: data.tokenizer"),
        (["train", "demo", "--set", "model.weights="], "The recipe has mistakes. Got: model.weights"),
        (["train", "demo", "--set", "steps"], "An override reads section.key=value."),
        (["generate", "no-such-folder", "-p", "x"], "There is no folder no-such-folder."),
        (["generate", "no-such-folder", "-p", "x", "--drafts", "many"], "--drafts is a number or auto."),
        (["generate", "no-such-folder", "-p", "x", "--dtype", "int3"], "There is no such type of number here."),
        (["generate", "no-such-folder", "-p", "x", "--cache", "fp8"], "There is no such cache here. Got: 'fp8'."),
        (["bench", "no-such-folder", "--cache", "int4"], "There is no such cache here. Got: 'int4'."),
        (["chat", "no-such-folder"], "There is no folder no-such-folder."),
        (["eval", "no-such-folder"], "There is no folder no-such-folder."),
        (["eval", "m", "--needle", "--by-position"], "eval does one thing at a time. Got: --by-position and --needle."),
        (["eval", "m", "--tasks", "arc_easy", "--needle"], "eval does one thing at a time."),
        (["eval", "m", "--tasks", "arc_easy", "--data", "x", "--out", "y"], "--data, --out would do nothing here."),
        (["eval", "m", "--by-position", "--lengths", "4k"], "--lengths would do nothing here."),
        (["eval", "m", "--depths", "5"], "--depths would do nothing here. Got: --depths with held-out text."),
        (["eval", "m", "--cache", "int8"], "--cache would do nothing here."),
        (["eval", "m", "--needle", "--cache", "fp8"], "There is no such cache here."),
        (["eval", "m", "--needle", "--shots", "2"], "--shots would do nothing here."),
        (["eval", "m", "--limit", "2"], "--limit would do nothing here."),
        (["eval", "m", "--text-key", "body"], "--text-key is for the text that --data names."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(arguments: list[str], says: str) -> None:
    shown = call(*arguments)
    assert shown.exit_code == 2
    assert shown.stderr.startswith(says)
    assert shown.stdout == ""
    as_json = call(*arguments, "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["error"].startswith(says)


def test_keys_that_may_be_missing_are_taken_out_by_none() -> None:
    from cavelight.spec.recipe import Recipe

    given = {"data": {"row_length": 64}, "train": {"steps": 5, "minutes": 1.0, "rows_per_microbatch": 4}}
    changes = ["train.minutes=none", "train.save_every=none", "train.rows_per_microbatch=none", "data.tokenizer=none"]
    recipe = Recipe.build(given, [*changes, "model.q_lora_rank=none", "train.recompute=none", "model.weights = none"])
    train = recipe.train
    assert (train.steps, train.minutes, train.save_every, train.rows_per_microbatch) == (5, None, None, None)
    assert (recipe.data.tokenizer, recipe.model.weights, recipe.config.q_lora_rank) == (None, None, None)
    assert train.recompute == "none"
    for change in ("train.seed=none", "train.nothing=none", "model.hidden_size=none", "nowhere.x=none"):
        with pytest.raises(UserError, match=r"mistakes|configuration"):
            _ = Recipe.build(given, [change]).config


def test_overrides_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[model]\noverrides = 5\n", encoding="utf-8")
    for changes in ([], ["--set", "model.hidden_size=8"]):
        shown = call("train", str(tmp_path / "mine.toml"), *changes)
        assert shown.exit_code == 2
        assert "model.overrides" in shown.stderr


@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"'])
def test_a_recipe_json_that_is_no_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_text(content, encoding="utf-8")
    shown = call("train", "--resume", str(tmp_path))
    assert shown.exit_code == 2
    assert "is not a run that can go on. Got: a recipe.json that holds a" in shown.stderr


def test_python_m_reports_the_exit_code() -> None:
    done = subprocess.run([sys.executable, "-m", "cavelight", "plan", "v3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("There is no preset 'v3'.")
    assert "Traceback" not in done.stderr


def test_ctrl_c_gets_a_sentence_and_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, telling(as_json=False):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    assert capsys.readouterr().err.strip() == "Stopped by Ctrl-C."


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), telling(as_json=True):
        _ = 1 / 0


def test_the_package_offers_what_it_lists() -> None:
    for name in cavelight.__all__:
        assert getattr(cavelight, name)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = cavelight.lode


def test_a_recipe_says_where_its_text_lies_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cavelight.spec.recipe import Recipe

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "stdlib").write_text("a file of that name", encoding="utf-8")
    (tmp_path / "here" / "a.txt").write_text("text", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    mixture = [{"corpus": "a.txt"}, {"corpus": "*.txt"}, {"corpus": "stdlib"}, {"corpus": "nowhere.txt"}]
    recipe = Recipe.build({"data": {"corpus": mixture, "row_length": 64}, "train": {"steps": 1}})
    here = str(tmp_path / "here")
    names = [f"{here}/a.txt", f"{here}/*.txt", "stdlib", "nowhere.txt"]
    assert [source.corpus for source in recipe.data.sources] == names
    monkeypatch.chdir(tmp_path)
    assert Recipe.build(recipe.model_dump()) == recipe
