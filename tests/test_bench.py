"""`cavelight bench`: what is counted is what is read, and cases are what they say."""

import json
from argparse import ArgumentTypeError
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cavelight.bench import cases as bench_cases
from cavelight.bench.cases import Case, Measured, cache_bytes, expert_bytes, flops, head_bytes, layer_bytes, measure
from cavelight.bench.peers.transformers import Transformers
from cavelight.bench.probes import Probes
from cavelight.bench.sweep import Row, cases
from cavelight.cli.main import app
from cavelight.errors import UserError
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.run.paged import PagedCache
from cavelight.run.quick import quick
from cavelight.spec.cost import active_parameters, flops_per_token, stored_bytes_per_token, total_parameters
from cavelight.spec.formats import FP8, INT8
from cavelight.spec.presets import preset
from cavelight.spec.variants import with_plain_attention
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .reference.tiny import tiny
from .run_models import random_model, small_config


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "SECONDS", 0.01)
    monkeypatch.setattr("cavelight.bench.sweep.probe", lambda: Probes(1e10, 1e11, 1e11))
    monkeypatch.setattr("cavelight.bench.sweep.read_bandwidth", lambda seconds: 1e10)


def plain_bytes(model: Transformer) -> int:
    return layer_bytes(model) + head_bytes(model)


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
    assert flops(config, Case("decoding", 4096)) == flops_per_token(config, 4096)
    assert flops(config, Case("decoding", 128, batch=4)) == 4 * flops_per_token(config, 128)
    assert flops(config, Case("verifying", 128, 5)) == 5 * flops_per_token(config, 128, queries=5)
    head = 2 * config.vocab_size * config.hidden_size
    chunks = [512 * (flops_per_token(config, past, queries=512, form="expanded") - head) for past in (0, 512)]
    assert flops(config, Case("prompt", 0, 1024)) == pytest.approx(sum(chunks) + head, rel=1e-12)


def test_a_prompt_asks_for_one_token() -> None:
    """As in generating, whatever its length; of drafts all are asked."""
    model = random_model(small_config(max_position_embeddings=64))
    for case, rows in ((Case("prompt", 0, 5), 1), (Case("prompt", 0, 5, 3), 3), (Case("verifying", 8, 5), 5)):
        with patch.object(quick(model), "head", side_effect=quick(model).head) as head:
            measure(model, case, clock=lambda: 0.0)
        assert {len(call.args[0]) for call in head.call_args_list} == {rows}


def test_measuring_counts_steps_and_tokens() -> None:
    model = random_model(small_config(max_position_embeddings=64))
    ticks = iter(range(10**6))
    found = measure(model, Case("decoding", 16, 1, 3), clock=lambda: float(next(ticks)))
    assert set(found.seconds) == {1.0} and found.tokens_per_second == 3
    rows = 3 * 17 * stored_bytes_per_token(model.config, 4)
    assert plain_bytes(model) + rows < found.read <= 4 * total_parameters(model.config) + rows


def test_every_chunk_of_a_prompt_reads_layers_and_past_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "CHUNK", 16)
    config = small_config(max_position_embeddings=64, first_k_dense_replace=2)  # no experts, which differ by chance
    model, ticks = random_model(config), iter(range(10**6))
    found = measure(model, Case("prompt", 0, 40), clock=lambda: float(next(ticks)))
    rows = (16 + 32 + 40) * stored_bytes_per_token(config, 4)
    assert found.read == 3 * layer_bytes(model) + head_bytes(model) + rows


def test_cases_fit_context_and_memory() -> None:
    config = preset("mid").replace(max_position_embeddings=4096)
    found, left_out = cases(config, torch.bfloat16, (1, 512, 4096, 8192), (128, 128, 16384), (1, 4, 10**6))
    assert [case.name for case in found] == [
        "prompt 1",
        "prompt 512",
        "prompt 4,096",
        "decoding at 128",
        "verifying 5 at 128",
        "decoding at 128, 4 at once",
    ]
    assert [(each.case.name, each.why) for each in left_out] == [
        ("prompt 8,192", "the model's context has 4,096 tokens"),
        ("decoding at 16,384", "the model's context has 4,096 tokens"),
        ("decoding at 128, 1,000,000 at once", "the cache would take 2,875.4 GB of at most 4.3"),
    ]
    assert {case.kind for case in found} == {"prompt", "decoding", "verifying"}


def test_the_cache_takes_what_was_counted() -> None:
    config, case = small_config(max_position_embeddings=256, num_nextn_predict_layers=1), Case("decoding", 64, batch=3)
    with patch.object(bench_cases, "PagedCache", side_effect=PagedCache) as made:
        measure(random_model(config), case, clock=lambda: 0.0)
    assert PagedCache(*made.call_args.args).bytes() == cache_bytes(config, case, torch.float32)


def test_the_command_writes_numbers_and_a_figure(tmp_path: Path) -> None:
    shown = run("nano", "--prompts", "32", "--depths", "0,64", "--batches", "2", "--out", str(tmp_path), "--json")
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
    options = ("--prompts", "1,32", "--depths", "8", "--batches", "", "--out", str(tmp_path))
    shown = run("nano", *options, "--against", "transformers")
    assert shown.exit_code == 0, shown.output
    rows = {case["name"]: case for case in json.loads((tmp_path / "bench.json").read_text())["cases"]}
    assert rows["decoding at 8"]["ratio"] > 0 and rows["prompt 32"]["ratio"] > 0
    assert rows["prompt 1"]["ratio"] > 0
    assert rows["verifying 5 at 8"]["ratio"] is None


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_checkpoint(random_model(preset("nano")), folder / "plain")
    convert(folder / "plain", folder / "int8", INT8)
    convert(folder / "plain", folder / "fp8", FP8)
    return folder


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_packed_weights_are_not_compared_with_transformers(packed: Path, format: str) -> None:
    shown = run(str(packed / format), "--against", "transformers")
    assert shown.exit_code == 2 and "Packed weights cannot be compared" in " ".join(shown.output.split())


def test_plain_attention_is_not_compared_with_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = random_model(with_plain_attention(tiny(), 4))
    write_checkpoint(model, tmp_path)
    with pytest.raises(UserError, match="knows latent attention alone"):
        Transformers(tmp_path, model.config, torch.float32)


def test_a_model_that_transformers_fills_at_random_is_not_compared(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = random_model(preset("nano"))
    write_checkpoint(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"does not find all weights.*layers\.1\.self_attn\.kv_b_proj"):
        Transformers(tmp_path, model.config, torch.float32)


@pytest.mark.usefixtures("hasty")
def test_a_checkpoint_needs_no_tokenizer(tmp_path: Path) -> None:
    """Nor the MTP modules that its configuration announces, if told."""
    write_checkpoint(random_model(preset("nano").replace(num_nextn_predict_layers=0)), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}))
    asked = (str(tmp_path), "--prompts", "8", "--depths", "4", "--batches", "", "--out", str(tmp_path / "out"))
    assert run(*asked).exit_code == 2
    shown = run(*asked, "--without-mtp")
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "out" / "bench.json").exists()


@pytest.mark.usefixtures("hasty", "plainly")
def test_why_there_are_no_native_layers_is_said(tmp_path: Path) -> None:
    shown = run("nano", "--prompts", "4", "--depths", "", "--batches", "", "--out", str(tmp_path))
    assert "without native layers: a test is without" in " ".join(shown.output.split())
    assert json.loads((tmp_path / "bench.json").read_text())["without_native"] == "a test is without"


@pytest.mark.usefixtures("hasty")
def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    asked = ("nano", "--prompts", "1,9k", "--depths", "0,508,16k", "--batches", "10m", "--out", str(tmp_path))
    shown = run(*asked)
    said = " ".join(shown.output.split())
    assert shown.exit_code == 0, shown.output
    for name in ("prompt 9,216", "decoding at 16,384", "decoding at 0, 10,485,760 at once"):
        assert f"Left out: {name}, since " in said
    told = json.loads((tmp_path / "bench.json").read_text())
    assert [case["name"] for case in told["cases"]] == [
        "prompt 1",
        "decoding at 0",
        "decoding at 508",
        "verifying 5 at 0",
    ]
    assert len(told["left_out"]) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nano", "--against", "nobody"], "no such peer"),
        (["nano", "--prompts", "many"], "--prompts cannot be used. Got: many. Why: it takes whole numbers from 1 on"),
        (["nano", "--prompts", "0"], "--prompts cannot be used"),
        (["nano", "--prompts", "512,-4"], "--prompts cannot be used"),
        (["nano", "--prompts", "1.5"], "--prompts cannot be used"),
        (["nano", "--depths", "-1"], "--depths cannot be used. Got: -1. Why: it takes whole numbers from 0 on"),
        (["nano", "--batches", "0"], "--batches cannot be used"),
        (["nano", "--prompts", "", "--depths", ","], "no prompt and no depth was given"),
        (["nano", "--prompts", "9k", "--depths", "9k"], "nothing to measure. Why: prompt 9,216: the model's context"),
        (["nano", "--dtype", "foo"], "no such type of number"),
        (["nano", "--dtype", "float16"], "no such type of number"),
        (["deepseek-v3", "--dtype", "bfloat16"], "Memory is too small to hold this model"),
        (["nano", "--out", "/dev/null"], "/dev/null cannot be written"),
        (["nowhere"], "no folder nowhere"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    with patch("cavelight.bench.sweep.probe", side_effect=AssertionError("told too late")):
        shown = run(*arguments)
    assert shown.exit_code == 2 and says in " ".join(shown.output.split())


def test_why_a_peer_failed_is_told() -> None:
    from bench.training import Measured, _rate, first_line_of_error

    told = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: too much | of it\nmore of it\n"
    failed = first_line_of_error("ValueError: before\n" + told)
    assert failed == "torch.OutOfMemoryError: too much | of it" and first_line_of_error("Killed\n") == ""
    assert _rate((4, 512), Measured((), failed=failed)) == "failed: torch.OutOfMemoryError: too much   of it"
    assert (_rate((4, 512), None), _rate((4, 512), Measured((2.0,)))) == ("not tried", "1,024")


def test_shares_are_parts_of_the_probes() -> None:
    row = Row(Measured(Case("decoding", 0), (0.5, 0.5, 9.0), 1e9, 2e9), None, Probes(4e9, 8e9, 1e9))
    assert row.bandwidth_share == 0.5 and row.peak_share == 0.5 and row.ratio is None


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "many", "²", ""])
def test_scripts_count_from_one(text: str) -> None:
    """Or a page about nothing would take the place of one that says something."""
    from bench.provenance import some

    assert some("12") == 12
    with pytest.raises(ArgumentTypeError, match="whole number"):
        some(text)
