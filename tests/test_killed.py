"""SIGKILL and Ctrl-C, sent to the real command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench import resume

from cavelight.train.state import read_metrics

from .runs import corpus

__all__ = ["corpus"]  # a fixture


def test_a_run_that_was_killed_three_times_equals_one_that_was_not(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "resume.md"
    changes = [f"data.corpus={corpus}", "train.evaluate_bytes=100", "train.evaluate_every=10"]
    call = ["--kills", "3", "--steps", "30", "--folder", str(tmp_path / "runs"), "--out", str(page)]
    assert resume.main([*call, *(part for change in changes for part in ("--set", change))]) == 0, page.read_text()
    text = page.read_text()
    assert "**Equal to the bit.** 37 lines of the log." in text  # 30 steps, 3 looks, 3 samples, all held-out text
    assert "SIGKILL 3 times" in text and "--kills 3" in text
    assert not (tmp_path / "runs").exists()


def test_two_runs_that_differ_are_told_apart(tmp_path: Path) -> None:
    runs = [resume.RunFolder(tmp_path / name) for name in ("one", "other")]
    for number, run in enumerate(runs):
        for folder in (run.saves / "step-00000001", run.model, run.average):
            folder.mkdir(parents=True)
            (folder / "weights.safetensors").write_bytes(bytes([number]))
        (run.saves / "step-00000001" / "state.json").write_text(json.dumps({"rows": 1, "seconds": number}))
        run.metrics.write_text(json.dumps({"kind": "step", "loss": 1.0, "seconds": number}) + "\n")
    unlike = [f"{folder}/weights.safetensors" for folder in ("step-00000001", "model", "model-ema")]
    assert resume.compare(*runs) == unlike
    (runs[1].saves / "step-00000001" / "state.json").write_text(json.dumps({"rows": 2, "seconds": 0}))
    runs[1].metrics.write_text("")
    assert resume.compare(*runs) == [*unlike, "step-00000001/state.json", "metrics.jsonl"]


def test_a_second_ctrl_c_ends_at_once_and_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    changes = ("model.preset=nano", "data.row_length=64", f"data.corpus={corpus}", "data.held_out_every=5")
    changes += ("train.minutes=60", "train.rows_per_step=64", "train.rows_per_microbatch=64", "train.save_every=1")
    sets = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "cavelight", "train", "demo", "--out", str(tmp_path), *sets, "--json"]
    heard: list[dict[str, object]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            heard.append(json.loads(line))
            if heard[-1]["kind"] == "saved":  # the second step is under way, and takes its time
                os.kill(run.pid, signal.SIGINT)
                os.kill(run.pid, signal.SIGTERM)  # the same to us; of two equal ones that wait, only one arrives
                break
        heard += [json.loads(line) for line in run.stdout]
    assert run.returncode == 130
    assert heard[-1]["kind"] != "result"  # it did not wait for the step and its save
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["kind"] == "step"
