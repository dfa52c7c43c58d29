"""`cavelight bench`: what is counted is what is read, and cases are what they say."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cavelight.bench.cases import Case, expert_bytes, flops, measure, plain_bytes
from cavelight.bench.sweep import Row, cases
from cavelight.cli.main import app
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.spec.cost import active_parameters, flops_per_token, stored_bytes_per_token, total_parameters
from cavelight.spec.formats import INT8
from cavelight.spec.presets import preset
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .run_models import random_model, small_config


def test_the_reference_is_what_the_tables_speak_of() -> None:
    mid = preset("mid")
    read = 2 * active_parameters(mid, embedding=False)  # a token's bytes in bfloat16, before any past
    assert read == pytest.approx(536e6, rel=0.02)
    assert stored_bytes_per_token(mid) == 12 * (512 + 64) * 2


def test_bytes_of_one_token_are_the_active_weights() -> None:
    model = random_model(small_config(num_nextn_predict_layers=1))
    _, routings = model(torch.tensor([3]), torch.tensor([0]), PackedAttend([1]), GroupedDispatch())
    active = active_parameters(model.config, embedding=False)
    assert plain_bytes(model) + expert_bytes(model, routings) == pytest.approx(4 * active)


def test_bytes_of_many_tokens_are_all_weights() -> None:
    model = random_model(small_config(num_nextn_predict_layers=1))
    E = model.config.n_routed_experts
    everybody = Routing(torch.arange(E)[:, None], torch.ones(E, 1), torch.ones(E, E))
    embedding = model.config.vocab_size * model.config.hidden_size
    assert plain_bytes(model) + expert_bytes(model, [everybody]) == 4 * (total_parameters(model.config) - embedding)


def test_packed_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    model = Transformer(preset("nano"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    write_checkpoint(model, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "int8", INT8)
    packed = read_checkpoint(tmp_path / "int8", packed=True)
    assert plain_bytes(packed) < 0.6 * plain_bytes(model)


def test_operations_are_those_of_the_cost_model() -> None:
    config = preset("mid")
    assert flops(config, Case(4096)) == flops_per_token(config, 4096)
    assert flops(config, Case(128, batch=4)) == 4 * flops_per_token(config, 128)
    prompt = flops(config, Case(0, 1024))
    expected = [512 * flops_per_token(config, past, queries=512, form="expanded") for past in (0, 512)]
    assert prompt == sum(expected)


def test_measuring_counts_steps_and_tokens() -> None:
    model = random_model(small_config(max_position_embeddings=64))
    ticks = iter(range(10**6))
    found = measure(model, Case(16, 1, 3), clock=lambda: float(next(ticks)))
    assert set(found.seconds) == {1.0} and found.tokens_per_second == 3
    rows = 3 * 17 * stored_bytes_per_token(model.config, 4)
    assert plain_bytes(model) + rows < found.read <= 4 * total_parameters(model.config) + rows


def test_cases_fit_the_context() -> None:
    found = cases(4096, (512, 4096, 8192), (128, 16384), (1, 4))
    assert found == [Case(0, 512), Case(0, 4096), Case(128), Case(128, 1, 4)]
    assert [case.name for case in found] == [
        "prompt 512",
        "prompt 4,096",
        "decoding at 128",
        "decoding at 128, 4 at once",
    ]
    assert Case(4096, 5).name == "verifying 5 at 4,096"


def test_the_command_writes_numbers_and_a_figure(tmp_path: Path) -> None:
    options = ["--prompts", "32", "--depths", "0,64", "--batches", "2", "--out", str(tmp_path), "--json"]
    shown = CliRunner().invoke(app, ["bench", "nano", *options])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout.splitlines()[-1])
    assert [case["name"] for case in told["cases"]] == [
        "prompt 32",
        "decoding at 0",
        "decoding at 64",
        "verifying 5 at 64",
        "decoding at 0, 2 at once",
    ]
    assert all(case["tokens_per_second"] > 0 and case["bandwidth_share"] > 0 for case in told["cases"])
    assert json.loads((tmp_path / "bench.json").read_text())["cases"] == told["cases"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_takes_turns(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = ["--prompts", "32", "--depths", "8", "--batches", "", "--out", str(tmp_path), "--against", "transformers"]
    shown = CliRunner().invoke(app, ["bench", "nano", *options])
    assert shown.exit_code == 0, shown.output
    rows = {case["name"]: case for case in json.loads((tmp_path / "bench.json").read_text())["cases"]}
    assert rows["decoding at 8"]["ratio"] > 0 and rows["prompt 32"]["ratio"] > 0
    assert rows["verifying 5 at 8"]["ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nano", "--against", "nobody"], "no such peer"),
        (["nano", "--prompts", "many"], "no number of tokens"),
        (["nano", "--prompts", "9k", "--depths", "9k"], "Nothing was measured"),
        (["nowhere"], "no folder nowhere"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    shown = CliRunner().invoke(app, ["bench", *arguments])
    assert shown.exit_code == 2 and says in " ".join(shown.output.split())


def test_why_a_peer_failed_is_told() -> None:
    from bench.training import Measured, _rate, first_line_of_error

    told = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: too much | of it\nmore of it\n"
    failed = first_line_of_error("ValueError: before\n" + told)
    assert failed == "torch.OutOfMemoryError: too much | of it" and first_line_of_error("Killed\n") == ""
    assert _rate((4, 512), Measured((), failed=failed)) == "failed: torch.OutOfMemoryError: too much   of it"
    assert (_rate((4, 512), None), _rate((4, 512), Measured((2.0,)))) == ("not tried", "1,024")


def test_shares_are_parts_of_the_probes() -> None:
    from cavelight.bench.cases import Measured
    from cavelight.bench.probes import Probes

    row = Row(Measured(Case(0), (0.5, 0.5, 9.0), 1e9, 2e9), None, Probes(4e9, 8e9, 1e9))
    assert row.bandwidth_share == 0.5 and row.peak_share == 0.5 and row.ratio is None
