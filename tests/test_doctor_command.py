"""`cavelight doctor` as its users meet it, and at full size."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from cavelight.cli.doctor import store_hidden
from cavelight.cli.main import app
from cavelight.data.tokenizer import train_tokenizer
from cavelight.doctor import running
from cavelight.doctor.examine import examine
from cavelight.doctor.findings import Finding, failed, passed, warned, worst_first
from cavelight.spec.presets import preset
from cavelight.weights.headers import Entry

from .patients import patient
from .reference.tiny import tiny
from .sparse import write_sparse

ROOT = Path(__file__).parent.parent


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_a_sound_checkpoint_leaves_with_0(tmp_path: Path) -> None:
    folder = patient(tiny()).write(tmp_path / "model")
    shown = call(folder)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"0 fail, 0 warn, \d+ pass, in \d+ s", shown.output)
    assert call(tmp_path).exit_code == 0  # a run's folder, with the checkpoint inside


def test_a_warning_leaves_with_0_and_a_failure_with_1_and_comes_first(tmp_path: Path) -> None:
    sick = patient(tiny())
    sick.raw["norm_topk_prob"] = False
    assert call(sick.write(tmp_path / "model"), "--level", "headers").exit_code == 0
    del sick.tensors["model.norm.weight"]
    shown = call(sick.write(tmp_path / "model"), "--level", "headers")
    assert shown.exit_code == 1
    verdicts = re.findall(r"^(fail|warn|pass) ", shown.output, re.MULTILINE)
    assert verdicts == sorted(verdicts, key=["fail", "warn", "pass"].index) and verdicts[:2] == ["fail", "warn"]


def test_json_says_the_same(tmp_path: Path) -> None:
    sick = patient(tiny())
    sick.tensors["model.norm.weight"][0] = torch.nan
    shown = call(sick.write(tmp_path / "model"), "--json")
    assert shown.exit_code == 1
    *events, result = map(json.loads, shown.stdout.splitlines())
    assert {event["kind"] for event in events} == {"phase"}
    assert (result["kind"], result["level"], result["counts"]["fail"]) == ("result", "weights", 1)
    assert result["config"]["num_hidden_layers"] == 2 and result["seconds"] > 0
    (bad,) = (finding for finding in result["findings"] if finding["verdict"] == "fail")
    assert (bad["check"], bad["value"]) == ("finite", {"tensors": {"model.norm.weight": 1}})


@pytest.mark.parametrize(
    "arguments",
    [
        ("nowhere",),
        (".", "--level", "all"),
        (".", "--store"),
        (".", "--against", "llama.cpp"),
        (".", "--text", "config.json"),
    ],
)
def test_what_is_no_checkpoint_or_no_option_leaves_with_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(patient(tiny()).write(tmp_path / "model"))
    assert call(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("stored", "better", "is_new"),
    [
        ({}, "pre_norm", True),
        ({}, "post_norm", True),  # what silence means, and now it is known
        ({"mtp_hidden": "pre_norm"}, "post_norm", True),
        ({"mtp_hidden": "pre_norm"}, "pre_norm", False),
        ({}, None, False),
    ],
)
def test_what_mtp_wants_is_stored(stored: dict[str, str], better: str | None, is_new: bool, tmp_path: Path) -> None:
    folder = patient(tiny()).write(tmp_path / "model")
    before = json.loads((folder / "config.json").read_text()) | stored
    (folder / "config.json").write_text(json.dumps(before))
    said = store_hidden(folder, [Finding("mtp-hidden", "fail", "", 6, {"better": better})])
    after = json.loads((folder / "config.json").read_text())
    assert after == before | ({"mtp_hidden": better} if better else {})
    assert (said is not None) == is_new
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_configuration_that_is_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    """As in the hub's cache, whose files several revisions share."""
    folder = patient(tiny()).write(tmp_path / "model")
    shared = (folder / "config.json").rename(tmp_path / "shared.json")
    (folder / "config.json").symlink_to(shared)
    before = shared.read_bytes()
    store_hidden(folder, [Finding("mtp-hidden", "fail", "", 6, {"better": "pre_norm", "configured": "post_norm"})])
    assert shared.read_bytes() == before and not (folder / "config.json").is_symlink()
    assert json.loads((folder / "config.json").read_bytes()) == json.loads(before) | {"mtp_hidden": "pre_norm"}


def test_a_tokenizer_of_another_model_is_not_run_on(tmp_path: Path) -> None:
    folder = patient(tiny(vocab_size=262)).write(tmp_path / "model")
    train_tokenizer(["text of a few words " * 9], 270).save(folder)
    findings = examine(folder, "model", text="text of a few words " * 500, against="transformers")
    assert {f.check: f.verdict for f in findings if f.verdict != "pass"} == {
        "vocabulary": "fail",
        "model": "warn",
        "against": "warn",
    }


def test_the_model_runs_where_there_is_a_tokenizer_and_beside_transformers_in_any_case(tmp_path: Path) -> None:
    folder = patient(tiny(vocab_size=300)).write(tmp_path / "model")
    checks = {finding.check: finding for finding in examine(folder, "model", against="transformers")}
    assert checks["model"].verdict == "warn" and "There is no tokenizer" in checks["model"].sentence
    assert checks["against-transformers"].verdict == "pass"
    train_tokenizer(["text of a few words"], 264).save(folder)
    findings = examine(folder, "model", text="text of a few words " * 500)
    assert {"model", "against-transformers"}.isdisjoint(finding.check for finding in findings)
    assert [finding for finding in findings if finding.verdict == "fail"] == []
    assert {"probes", "rope-pairing"} & {finding.check for finding in findings}


def test_a_model_larger_than_memory_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "machine_memory", lambda: 1000)
    findings = examine(patient(tiny()).write(tmp_path / "model"), "model")
    (found,) = (finding for finding in findings if finding.verdict != "pass")
    assert (found.check, found.verdict) == ("model", "warn") and "memory" in found.sentence


def test_findings_are_ordered_by_verdict_and_then_as_they_came() -> None:
    a, b, c, d = passed("a", ""), failed("b", ""), warned("c", ""), failed("d", "")
    assert worst_first([a, b, c, d]) == [b, d, c, a]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    """A whole V3 of holes, and what it stores."""
    folder = tmp_path_factory.mktemp("full") / "v3"
    return folder, write_sparse(folder, preset("deepseek-v3"), shards=163)


def test_the_full_size_of_v3_is_as_released(full_size: tuple[Path, list[Entry]]) -> None:
    """91,991 tensors: 46,183 of weights, of which 45,808 are fp8 matrices with scales beside them."""
    _, entries = full_size
    scales = [entry for entry in entries if entry.name.endswith("_scale_inv")]
    assert (len(entries), len(scales)) == (91_991, 45_808)
    assert sum(entry.size for entry in scales) == 41_540_496
    assert sum(entry.size for entry in entries) == 684_489_845_504 + 41_540_496
    assert sum(entry.name.startswith("model.layers.61.") for entry in entries) == 1_564
    shapes = {entry.name: entry.shape for entry in scales}
    attention = "model.layers.61.self_attn"
    assert shapes[f"{attention}.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)  # 576 rows: the last block is ragged
    assert shapes[f"{attention}.o_proj.weight_scale_inv"] == (56, 128)


def in_a_process_of_its_own(*arguments: str) -> tuple[dict[str, Any], float, int]:
    """What a command says with --json, its seconds of processor time, and its peak of memory in bytes."""
    program = (
        "import json, resource, sys\n"
        "from bench.peak import peak_bytes\n"
        "from cavelight.cli.main import app\n"
        "try:\n"
        f"    app({[*arguments, '--json']!r})\n"
        "finally:\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(json.dumps([used.ru_utime + used.ru_stime, peak_bytes()]))\n"  # maxrss would be pytest's
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr + run.stdout
    *_, said, used = map(json.loads, run.stdout.splitlines())
    return said, used[0], used[1]


def test_the_header_pass_of_a_full_size_v3_is_quick_and_small(full_size: tuple[Path, list[Entry]]) -> None:
    folder, _ = full_size
    files = list(folder.iterdir())
    assert sum(file.suffix == ".safetensors" for file in files) == 163
    assert sum(file.stat().st_size for file in files) > 688e9 and sum(f.stat().st_blocks * 512 for f in files) < 1e8
    began = time.monotonic()
    said, _, peak = in_a_process_of_its_own("doctor", str(folder), "--level", "headers")
    seconds = time.monotonic() - began
    findings = {finding["check"]: finding for finding in said["findings"]}
    assert {finding["verdict"] for finding in findings.values()} == {"pass"}
    assert (findings["files"]["value"]["tensors"], findings["files"]["value"]["files"]) == (91_991, 163)
    assert seconds < 60 and peak < 10**9


def test_a_plan_of_a_full_size_v3_takes_no_two_seconds(full_size: tuple[Path, list[Entry]]) -> None:
    """Processor time: the clock also counts what others do on a busy machine."""
    folder, _ = full_size
    _, seconds, _ = in_a_process_of_its_own("plan", str(folder))
    assert seconds < 2
