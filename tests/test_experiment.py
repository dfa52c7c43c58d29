"""Experiments: statistics by hand, the variants of each, runs that end, stop, fail and go on, the page they leave."""

import io
import json
import math
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cavelight.cli.experiment import Board
from cavelight.cli.main import app
from cavelight.errors import UserError
from cavelight.experiment import attention, balance, fp8, mtp, runs, shape, specialisation, texts, worker
from cavelight.experiment.catalogue import CATALOGUE, entry
from cavelight.experiment.page import plus_minus, signed, table, verdict
from cavelight.experiment.runs import ALL, FOUND, Job, go_through
from cavelight.experiment.statistics import Estimate, estimate, paired, quantile
from cavelight.experiment.study import Outcome, Run, Study
from cavelight.spec.cost import active_parameters, total_parameters
from cavelight.spec.events import Event, Note, Phase, Step
from cavelight.train.state import RunFolder, read_metrics

NANO = ["model.preset=nano", "train.steps=3", "train.save_every=1", "train.evaluate_every=100", "data.row_length=32"]
NANO += ["model.num_nextn_predict_layers=0", "train.rows_per_step=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        lines = [f"def twice_{number}(x): return {n} * x + {number}\n" for n in range(6)]
        (folder / f"{number}.py").write_text("".join(lines))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The experiment `balance` with its first and last variant alone."""
    (tmp_path / "toml").mkdir()
    here = Path(runs.__file__).parent
    shutil.copy(here / "base.toml", tmp_path / "toml")
    head, *variants = (here / "balance.toml").read_text(encoding="utf-8").split("[[variants]]")
    text = "[[variants]]".join([head, variants[0], variants[-1]])
    (tmp_path / "toml/balance.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr("cavelight.experiment.study.HERE", tmp_path / "toml")


def job_of(corpus: Path, folder: Path, study: str = "attention", *changes: str) -> Job:
    variant = Study.read("attention", [*NANO, f"data.corpus={corpus}", *changes]).variants[0]
    return Job(study, "mla-0", variant.seeded(0), folder)


# Statistics


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (10, 2.22814), (29, 2.04523)],
)
def test_quantiles_of_t(degrees: int, t: float) -> None:
    assert quantile(degrees) == pytest.approx(t, rel=3e-6)


def test_estimate_by_hand() -> None:
    found = estimate([1.0, 2.0, 6.0])  # mean 3, squares 4 + 1 + 9 = 14, variance 7
    assert found.mean == 3 and found.error == pytest.approx(math.sqrt(7 / 3))
    assert found.half == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)


def test_pairs_take_out_what_seeds_share() -> None:
    seeds = [1.0, 5.0, 9.0]
    found = paired([seed + gain for seed, gain in zip(seeds, (0.1, 0.2, 0.3), strict=True)], seeds)
    assert found.mean == pytest.approx(0.2) and found.error == pytest.approx(0.1 / math.sqrt(3))
    assert found.sign == 0 and paired([1.1, 1.2, 1.3], [1.0, 1.0, 1.1]).sign == 1
    assert paired([1.0, 1.0, 1.1], [1.1, 1.2, 1.3]).sign == -1


def test_one_seed_says_nothing() -> None:
    found = estimate([2.0])
    assert found.mean == 2 and math.isinf(found.error) and math.isinf(found.half) and found.sign == 0
    assert "single seed" in verdict(found, "this", "that", "bits")


def test_words_follow_the_numbers() -> None:
    assert verdict(Estimate(0.1, 0.01, 0.05, 3), "this", "that", "bits") == (
        "This has more bits than that: +0.1000 [+0.0500, +0.1500]."
    )
    assert "fewer bits" in verdict(Estimate(-0.1, 0.01, 0.05, 3), "this", "that", "bits")
    assert verdict(Estimate(0.1, 0.1, 0.2, 3), "this", "that", "bits").startswith("No difference in bits appears")
    assert plus_minus(Estimate(1.5, 0.25, 1.0, 3), 2) == "1.50 ± 0.25" and signed(Estimate(-1, 0, 1, 2), 1) == (
        "−1.0 [−2.0, +0.0]"
    )
    assert table([("", "a"), ("x", "1")]) == "|  | a |\n| --- | --: |\n| x | 1 |"


# Variants


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_experiment_can_be_built(name: str) -> None:
    study = Study.read(name, [])
    assert len({variant.key for variant in study.variants}) == len(study.variants) >= 3
    assert len({variant.recipe.model_dump_json() for variant in study.variants}) == len(study.variants)
    steps = {(variant.recipe.train.steps, variant.recipe.train.rows_per_step) for variant in study.variants}
    assert len(steps) == 1 and study.question


def test_attention_has_equal_sizes() -> None:
    study = Study.read("attention", ["model.hidden_size=256"])
    sizes = [total_parameters(variant.config, mtp=True) for variant in study.variants]
    assert max(sizes) <= 1.01 * min(sizes)
    heads = [variant.config.num_key_value_heads for variant in study.variants]
    assert heads == [None, 4, 2, 1] and {variant.config.hidden_size for variant in study.variants} == {256}


def test_shape_has_equal_active_sizes_but_for_the_gates() -> None:
    study = Study.read("shape", [])
    active = []
    for variant in study.variants:
        config = variant.config
        layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
        gates = layers * (config.n_routed_experts or 0) * (config.hidden_size + 1)
        active.append(active_parameters(config) - gates)
    assert len(set(active)) == 1


def test_what_differs_is_what_is_said() -> None:
    on, *others = (variant.recipe.train for variant in Study.read("balance", []).variants)
    assert on.bias_speed > 0 == on.expert_alpha == on.balance_alpha
    assert [train.bias_speed for train in others] == [0, 0, 0]
    assert [train.expert_alpha for train in others] == [0.003, 0.03, 0]
    kinds = [variant.recipe.train for variant in Study.read("specialisation", []).variants]
    assert [(t.balance_alpha > 0, t.bias_speed > 0, t.batch_alpha > 0) for t in kinds] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    modules = [variant.config.num_nextn_predict_layers for variant in Study.read("mtp", []).variants]
    assert modules == [0, 1, 1]


def test_changes_reach_all_variants_and_seeds_differ() -> None:
    study = Study.read("mtp", ["train.learning_rate=0.5"])
    assert {variant.recipe.train.learning_rate for variant in study.variants} == {0.5}
    assert [study.variants[0].seeded(seed).train.seed for seed in (0, 1)] == [0, 1]


def test_runs_by_the_clock_are_refused() -> None:
    with pytest.raises(UserError, match="number of steps"):
        Study.read("mtp", ["train.minutes=3"])


def test_names_are_told() -> None:
    with pytest.raises(UserError, match="did you mean balance"):
        entry("balanse")


# Text from Debian


def test_html_becomes_text() -> None:
    page = """<html><head><title>no</title></head><body><h1>One &amp; <em>two</em>
      three</h1><script>no</script><p>a  b<br>c</p><pre>x
  y</pre></body></html>"""
    assert texts.text_of_html(page) == "One & two three\na b\nc\nx\n  y\n"


def test_documents_are_cut_between_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "DOCUMENT", 10)
    assert texts.cut("12345\n12345\n123\n") == ["12345\n12345\n", "123\n"]
    assert texts.cut("") == []


def test_packages_are_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAVELIGHT_CACHE", str(tmp_path))
    fetched: list[str] = []

    def pages(package: str) -> list[str]:
        fetched.append(package)
        return [f"<p>the text of {package}"]

    monkeypatch.setattr(texts, "_pages", pages)
    monkeypatch.setattr(shutil, "which", lambda program: program)
    wanted = ({"corpus": "debian:one+two", "weight": 1.0}, {"corpus": "stdlib", "weight": 2.0})
    for _ in range(2):
        one, other = texts.resolved(wanted, lambda event: None)
    assert fetched == ["one", "two"] and other == wanted[1] and one["weight"] == 1.0
    files = sorted(Path(one["corpus"]).iterdir())
    assert [file.read_text() for file in files] == ["the text of one\n", "the text of two\n"]


def test_without_apt_one_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAVELIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(UserError, match=r"no apt-get here.*data\.corpus"):
        texts.resolved("debian:some-package", lambda event: None)


# Runs


def test_an_experiment_from_end_to_end(
    small: None, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four runs one is made by a process of its own; three are there, made in this one to save time."""
    changes = [*NANO, f"data.corpus={corpus}"]
    for variant in Study.read("balance", changes).variants:
        for seed in range(2):
            label = f"{variant.key}-{seed}"
            if label != "none-1":
                recipe, folder = variant.seeded(seed), tmp_path / "runs/balance" / label
                assert worker.make(Job("balance", label, recipe, folder), lambda event: None)
    options = [word for change in changes for word in ("--set", change)]
    places = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    command = ["experiment", "balance", "--seeds", "2", *options, *places, "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if line["kind"] == "phase"][-1]["done"] == 3
    result = lines[-1]
    assert {key: len(each) for key, each in result["runs"].items()} == {"bias": 2, "none": 2}
    page = (tmp_path / "out/balance.md").read_text(encoding="utf-8")
    mean = sum(run["bits_per_byte"] for run in result["runs"]["bias"]) / 2
    assert f"| bias | {mean:.4f} ± " in page and "(balance.png)" in page and "2 seeds" in page
    assert (tmp_path / "out/balance.png").read_bytes().startswith(b"\x89PNG")
    folder = RunFolder(tmp_path / "runs/balance/none-1")
    assert folder.read_recipe().train.seed == 1 and folder.model.is_dir() and not folder.saves.exists()

    monkeypatch.setattr(runs, "WORKER", ("false",))  # finished runs are only read
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and (tmp_path / "out/balance.md").read_text(encoding="utf-8") == page
    other = CliRunner().invoke(app, [*command, "--set", "train.beta2=0.5"])
    assert other.exit_code == 2 and "holds a run of another recipe" in other.output


def test_an_interrupted_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    job = job_of(corpus, tmp_path / "run")

    def stop_at_two(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            signal.raise_signal(signal.SIGTERM)

    assert not worker.make(job, stop_at_two)
    steps: list[int] = []
    assert worker.make(job, lambda event: steps.append(event.step) if isinstance(event, Step) else None)
    assert steps == [3]
    logged = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "step"]
    assert logged == [1, 2, 3] and (tmp_path / "run" / FOUND).is_file()


def test_drafts_are_counted(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp, "PROMPTS", 2)
    monkeypatch.setattr(mtp, "NEW_TOKENS", 6)
    job = job_of(corpus, tmp_path / "run", "mtp", "train.steps=1", "model.num_nextn_predict_layers=1")
    assert worker.make(job, lambda event: None)
    found = json.loads((tmp_path / "run" / FOUND).read_text())
    assert 0 <= found["accepted"] <= found["proposed"] and found["proposed"] > 0


def test_loads_are_shares_of_an_even_one(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    sources = f'data.corpus=[{{corpus="{corpus}"}}, {{corpus="{other}"}}]'
    job = job_of(corpus, tmp_path / "run", "specialisation", "train.steps=1", sources)
    assert worker.make(job, lambda event: None)
    kinds = json.loads((tmp_path / "run" / FOUND).read_text())["kinds"]
    assert set(kinds) == {corpus.name, "other"}
    for kind in kinds.values():
        assert kind["bits_per_byte"] > 0
        assert [sum(load) for load in kind["loads"]] == pytest.approx([8.0, 8.0])


# The pool, with a worker that is quick


def fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, does: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"import pickle, signal, sys, time\nfrom pathlib import Path\nsays = sys.stdout.buffer\n{does}\n")
    monkeypatch.setattr(runs, "WORKER", (sys.executable, str(script)))


def test_a_failing_run_is_told_after_the_others_are_made(
    small: None, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "error").write_bytes(pickle.dumps(UserError("The disk is full")))
    told = f"once = Path({str(tmp_path / 'once')!r})\nif once.exists(): sys.exit('no memory')\nonce.touch()\n"
    fake_worker(
        monkeypatch, tmp_path, told + f"says.write(Path({str(tmp_path / 'error')!r}).read_bytes())\nsys.exit(2)"
    )
    heard: list[str] = []

    def hear(name: str, event: Event | None) -> None:
        if name == ALL and isinstance(event, Note):
            heard.append(event.text)

    study = Study.read("balance", [*NANO, f"data.corpus={corpus}"])
    with pytest.raises(UserError, match="2 runs failed") as caught:
        go_through(study, 1, tmp_path / "runs", hear, cores=1)
    assert "bias-0: The disk is full" in str(caught.value) and "none-0: no memory" in str(caught.value)
    assert [text for text in heard if "no memory" in text]


def test_runs_are_told_to_save_when_all_is_stopped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "event").write_bytes(pickle.dumps(Note("begun")))
    saved = tmp_path / "saved"
    end = f"signal.signal(signal.SIGTERM, lambda *_: (Path({str(saved)!r}).touch(), sys.exit(130)))\n"
    fake_worker(
        monkeypatch,
        tmp_path,
        f"{end}says.write(Path({str(tmp_path / 'event')!r}).read_bytes())\nsays.flush()\ntime.sleep(60)",
    )

    def stop(name: str, event: Event | None) -> None:
        if name != ALL:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        go_through(Study.read("attention", [*NANO, f"data.corpus={corpus}"]), 1, tmp_path / "runs", stop, cores=1)
    assert saved.exists() and time.monotonic() - began < 50


def test_the_board_shows_what_is_under_way() -> None:
    board = Board("title")
    board.take(ALL, Phase("all runs", 3, 9, "steps"))
    board.take("a-0", Phase("evaluating", 1, 4, "tokens"))
    board.take("b-0", Phase("evaluating", 1, 4, "tokens"))
    board.take("b-0", None)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(board.draw())
    text = console.export_text()
    assert "3 of 9 steps" in text and "a-0" in text and "b-0" not in text


# Figures and tables of made-up runs


def outcome_of(name: str, tmp_path: Path, **more: object) -> Outcome:
    """Two seeds of every variant of an experiment, with made-up metrics."""
    study, made = Study.read(name, []), {}
    for rank, variant in enumerate(study.variants):
        made[variant.key] = [
            _run(tmp_path, f"{variant.key}-{seed}", rank + 0.1 * seed, seed, more) for seed in range(2)
        ]
    return Outcome(study, made)


def _run(tmp_path: Path, name: str, height: float, seed: int, more: dict[str, object]) -> Run:
    folder = RunFolder(tmp_path / name)
    folder.path.mkdir(parents=True)
    lines = [
        {
            "kind": "step",
            "step": step,
            "tokens": 100 * step,
            "loss": 2 + height / step,
            "mtp_loss": 3.0,
            "mtp_losses": [3.0],
            "seconds": 1.0 * step,
            "max_vio": [0.1 + height, 0.2],
            "counts": [[1, 3], [2, 2]],
        }
        for step in range(1, 21)
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(seed, folder, {"bits_per_byte": 2 + 0.1 * height, **more})


@pytest.mark.parametrize("name", ["attention", "mtp", "balance", "fp8", "shape", "specialisation"])
def test_tables_and_figures_of_all_experiments(name: str, tmp_path: Path) -> None:
    kinds = {kind: {"bits_per_byte": 2.0, "loads": [[0.5, 1.5], [1.0, 1.0]]} for kind in ("English", "code")}
    outcome = outcome_of(name, tmp_path, proposed=10, accepted=7, kinds=kinds)
    told = entry(name).tell(outcome)
    assert [len(row) for row in told.table] == [len(told.table[0])] * (1 + len(outcome.study.variants))
    assert told.verdict
    entry(name).draw(outcome, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_readings_of_a_run(tmp_path: Path) -> None:
    kinds = {"code": {"bits_per_byte": 2.0, "loads": [[0.5, 1.5], [1.0, 1.0]]}}
    outcome = outcome_of("fp8", tmp_path, proposed=10, accepted=7, kinds=kinds)
    run = outcome.runs["fp8"][0]  # its loss is 2 + 1 / step, the reference's 2
    assert mtp.acceptance(run) == 0.7 and specialisation.unevenness(run) == 0.25
    assert balance.max_vio(run) == pytest.approx((1.1 + 0.2) / 2)
    (error_P, _) = fp8.errors_of(outcome, "fp8")
    assert error_P[0] == pytest.approx(0.5) and error_P[1] == pytest.approx((0.9 * 1 + 1 * 0.5) / 1.9 / 2)
    assert attention.bits(run) == shape.bits(run) == pytest.approx(2.1)
