"""`cavelight generate`, `chat` and `bench` in careless hands: what is wrong is said, before anything is loaded."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cavelight.cli import generation
from cavelight.cli.main import app
from cavelight.data.tokenizer import train_tokenizer
from cavelight.errors import UserError
from cavelight.run.quick import BUILD
from cavelight.run.stats import Stats
from cavelight.weights.snapshot import write_checkpoint

from .run_models import drafting_model, small_config

BEFORE = ["generate", "no-such-folder", "-p", "x"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["some text that has words, and a é"], 280)
    config = small_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    write_checkpoint(drafting_model(config, surprise=0.3), folder, tokenizer)
    return folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "cavelight", *map(str, arguments)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--temperature", "-1"], "The sampling options cannot be used. Got: temperature = -1.0."),
        (["--temperature", "nan"], "The sampling options cannot be used. Got: temperature = nan."),
        (["--top-k", "-2", "--top-p", "2"], "The sampling options cannot be used. Got: top_k = -2, top_p = 2.0."),
        (["--min-p", "1.5"], "The sampling options cannot be used. Got: min_p = 1.5."),
        (["--repetition-penalty", "0"], "The sampling options cannot be used. Got: repetition_penalty = 0.0."),
        (["--seed", "-1"], "The sampling options cannot be used. Got: seed = -1."),
        (["--seed", str(10**30)], f"The sampling options cannot be used. Got: seed = {10**30}."),
        (["--stop", ""], "A stop string is empty."),
        (["--drafts", "-1"], "--drafts is a number or auto. Got: -1."),
        (["--drafts", "²"], "--drafts is a number or auto. Got: ²."),
        (["--drafts", "9" * 5000], "--drafts is a number or auto. Got: 999"),
        ([], "There is no folder no-such-folder."),
    ],
    ids=lambda value: str(value)[:50],
)
def test_options_are_looked_at_before_a_checkpoint_is_read(options: list[str], says: str) -> None:
    for where in (BEFORE, ["chat", "no-such-folder"]):
        shown = call(*where, *options)
        assert shown.exit_code == 2 and shown.stderr.startswith(says) and shown.stdout == ""
    as_json = call(*BEFORE, *options, "--json")
    assert as_json.exit_code == 2 and json.loads(as_json.stdout)["error"].startswith(says)


@pytest.mark.parametrize("number", ["-5", "1e5", "many"])
def test_a_number_of_new_tokens_is_one(number: str) -> None:
    shown = call(*BEFORE, "--max-new-tokens", number)
    assert shown.exit_code == 2 and "--max-new-tokens" in shown.stderr


@pytest.mark.parametrize(
    "options", [["--max-new-tokens", "0"], ["--max-new-tokens", str(10**30)], ["--drafts", "9" * 30]]
)
def test_no_number_is_too_large(checkpoint: Path, options: list[str]) -> None:
    shown = call("generate", checkpoint, "-p", "text", "--top-k", str(10**30), *options, "--json")
    stats = json.loads(shown.stdout)["stats"]
    assert shown.exit_code == 0 and stats["new_tokens"] == (0 if "0" in options else stats["new_tokens"]) < 128


def test_why_there_are_no_native_layers_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["generate", checkpoint, "-p", "text", "--max-new-tokens", "4"]
    assert "native" not in call(*asked).stderr
    monkeypatch.setattr(BUILD, "loaded", None)
    monkeypatch.setattr(BUILD, "reason", "it is a test")
    assert call(*asked).stderr.endswith("\nWithout native layers: it is a test.\n")
    assert json.loads(call(*asked, "--json").stdout)["stats"]["without_native"] == "it is a test"


def test_the_library_is_not_waited_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILD, "get", lambda wait=False: pytest.fail("it waits") if wait else None)
    shown = call("generate", checkpoint, "-p", "text", "--max-new-tokens", "4")
    assert shown.stderr.endswith("Without native layers: they are still being built, for the next run.\n")


def test_a_prompt_that_is_no_text(checkpoint: Path) -> None:
    told = subprocess.run(command("generate", checkpoint), input=b"caf\xe9", capture_output=True)
    assert told.returncode == 2 and told.stderr.startswith(b"The text is not valid Unicode.")


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_a_full_disk_behind_stdout_is_told(options: list[str]) -> None:
    for arguments in (["plan", "nano"], ["plan", "no-such-preset"]):
        if Path("/dev/full").exists() and (options or "nano" in arguments):
            with open("/dev/full", "w") as full:
                told = subprocess.run(command(*arguments, *options), stdout=full, stderr=subprocess.PIPE, text=True)
            assert (told.returncode, told.stderr.split(":")[0]) == (2, "The disk is full")
            assert "Traceback" not in told.stderr


def test_generating_into_a_full_disk_or_nowhere(checkpoint: Path) -> None:
    asked = command("generate", checkpoint, "-p", "text", "--max-new-tokens", "4")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            told = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True)
        assert told.returncode == 2 and told.stderr.startswith("The disk is full")
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&- <&-', "sh", *asked], stderr=subprocess.PIPE, text=True)
    assert closed.returncode == 0 and closed.stderr.startswith("4 tokens, ")
    without_prompt = ["sh", "-c", 'exec "$@" <&-', "sh", *command("generate", checkpoint)]
    told = subprocess.run(without_prompt, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 2 and told.stderr.startswith("There is no prompt.")


def test_a_reader_that_leaves_is_no_error(checkpoint: Path) -> None:
    asked = command("generate", checkpoint, "-p", "text", "--max-new-tokens", "120")
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_an_output_that_knows_no_other_letters(checkpoint: Path) -> None:
    asked = command("generate", checkpoint, "-p", "é", "--max-new-tokens", "2", "--json")
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        told = subprocess.run(asked, capture_output=True, env=environment, check=True)
        assert json.loads(told.stdout.decode(encoding))["prompt"] == "é"


class Slow:
    """A stream of text that is broken off after a piece."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.given, self.stats = error, 0, Stats(prompt_tokens=1)

    def __iter__(self) -> "Slow":
        return self

    def __next__(self) -> str:
        self.given += 1
        if self.given > 1:
            raise self.error
        return "a piece"


def test_ctrl_c_keeps_what_was_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        generation.show(Slow(KeyboardInterrupt()), shown)  # type: ignore[arg-type]
    assert shown == ["a piece"] and capsys.readouterr().out == "a piece\n"


def test_ctrl_c_and_errors_keep_what_json_had(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["generate", checkpoint, "-p", "text", "--json"]
    for error, code, lines in ((KeyboardInterrupt(), 130, 1), (UserError("The model produced NaN"), 2, 2)):
        slow = Slow(error)
        monkeypatch.setattr(generation.Options, "stream", lambda *_, slow=slow: slow)
        shown = call(*asked)
        said = [json.loads(line) for line in shown.stdout.splitlines()]
        assert (shown.exit_code, len(said), said[0]["text"]) == (code, lines, "a piece")
        assert lines == 1 or said[1]["error"] == "The model produced NaN."


def stopped(arguments: Sequence[str], until: str) -> "subprocess.CompletedProcess[str]":
    """The command, sent Ctrl-C once a line with `until` in it is there; again if it does not listen."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while until not in said and (line := process.stdout.readline()):
            said += line
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                rest, errors = process.communicate(timeout=30)
                return subprocess.CompletedProcess(arguments, process.returncode, said + rest, errors)
        process.kill()
    raise AssertionError(f"it does not stop after {said}")


def test_ctrl_c_in_the_middle_of_a_measurement(checkpoint: Path, tmp_path: Path) -> None:
    depths = ",".join(map(str, range(2, 100)))
    told = stopped(command("bench", checkpoint, "--depths", depths, "--out", tmp_path / "out"), "measuring: 0")
    assert told.returncode in (130, -signal.SIGINT) and told.stderr.endswith("\nStopped by Ctrl-C.\n")
    assert "Traceback" not in told.stderr and not list((tmp_path / "out").iterdir())
