"""`bench --against llama.cpp` and `vllm`: the same model there, asked for what we measure, and failures that tell why.

Programs written here stand in for the peers; where a peer itself is installed, it is asked as well.
"""

import ctypes
import json
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from cavelight.bench import cases as bench_cases
from cavelight.bench.cases import Case
from cavelight.bench.peers import gguf as our_gguf
from cavelight.bench.peers import llama_cpp, vllm
from cavelight.bench.peers.catalogue import PEERS, named
from cavelight.bench.peers.gguf import check_known, scales, tensors, write_gguf
from cavelight.bench.peers.subject import Subject, check_same, failed
from cavelight.bench.probes import Probes
from cavelight.cli.main import app
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig, Yarn
from cavelight.spec.cost import total_parameters
from cavelight.spec.formats import FP8, INT8
from cavelight.spec.presets import preset
from cavelight.spec.variants import with_plain_attention
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import write_checkpoint

from .reference.tiny import V2, some_tokens, tiny, yarn
from .run_models import random_model

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the package gguf is not installed")
MODELS: dict[str, ModelConfig] = {
    "nano": preset("nano"),
    "experts everywhere": tiny(first_k_dense_replace=0, n_shared_experts=2),
    "no experts": tiny(first_k_dense_replace=2),
    "groups": tiny(n_group=4, topk_group=2),
    "groups all open": tiny(n_group=4, topk_group=4),
    "V2-Lite": tiny(V2, rope_scaling=yarn(16, 0.707), routed_scaling_factor=3.0),
    "YaRN": tiny(rope_scaling=yarn(16)),
    "YaRN without the softmax's": tiny(rope_scaling=yarn(16, 1.0, 0.0)),
    "YaRN with two scales": tiny(rope_scaling=yarn(16, 0.707, 1.0)),
}
# What llama-bench does as far as we ask for it: a token takes it a millisecond, a repetition more one nanosecond more.
BENCH = """\
#!{python}
import json, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    print(json.dumps(asked), file=log)
if "--help" in sys.argv:
    print("-o, --output  -d, --n-depth <n>  -dev, --device")
    sys.exit()
{body}
tokens = int(asked["-p"]) + int(asked["-n"])
samples = [10**6 * tokens + i for i in range(int(asked["-r"]))]
print(json.dumps([{{"build_commit": "abc", "build_number": 7, "samples_ns": samples}}]))
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "SECONDS", 0.01)
    monkeypatch.setattr("cavelight.bench.sweep.probe", lambda: Probes(1e10, 1e11, 1e11))
    monkeypatch.setattr("cavelight.bench.sweep.read_bandwidth", lambda seconds: 1e10)


def program(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o755)
    return file


def bench_program(folder: Path, body: str = "") -> Path:
    return program(folder / "bench", BENCH.format(python=sys.executable, log=str(folder / "log"), body=body))


def asked_of(folder: Path) -> list[dict[str, str]]:
    lines = map(json.loads, (folder / "log").read_text().splitlines())
    return [line for line in lines if "-m" in line]


def test_names_of_peers_are_told() -> None:
    shown = run("nano", "--against", "nobody")
    assert shown.exit_code == 2
    assert f"no such peer. Got: nobody. Do: write --against with one of {', '.join(PEERS)}" in said(shown)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peer", "/bin/true"], "--peer is the program of a peer, and none is named"),
        (["--against", "transformers", "--peer", "/bin/true"], "transformers runs in this process"),
        (["--against", "llama.cpp", "--peer", "/nowhere"], "There is no llama-bench. Got: /nowhere, which is no"),
        (["--against", "llama.cpp", "--peer", "/bin/true"], "/bin/true is too old, or no llama-bench"),
        (["--against", "llama.cpp", "--peer", "/bin/false"], "/bin/false failed. Got: nothing said (exit status 1)"),
        (["--against", "vllm", "--peer", "/nowhere"], "no interpreter to run vLLM with. Got: /nowhere"),
        (["--against", "vllm", "--peer", "/bin/false"], "/bin/false has no vLLM. Got: no module named vllm"),
    ],
)
def test_programs_that_are_none(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cavelight.cli.bench.opened", lambda *_: pytest.fail("told too late"))
    shown = run("nano", *arguments)
    assert shown.exit_code == 2 and says in said(shown)


def test_programs_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no llama-bench. Got: nothing of that name on PATH"):
        llama_cpp.find(None)
    found = program(tmp_path / "llama-bench", bench_program(tmp_path).read_text())
    assert llama_cpp.find(None) == found
    if find_spec("vllm") is None:
        with pytest.raises(UserError, match="has no vLLM"):
            vllm.find(None)


def test_programs_in_this_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """./bench is a path without its dot by the time that it is looked for."""
    given = bench_program(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert llama_cpp.find(Path("./bench")) == given
    monkeypatch.setattr(vllm, "PROBE", "")
    (tmp_path / "python").symlink_to(sys.executable)
    assert vllm.find(Path("./python")) == tmp_path / "python"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir("/")
    assert llama_cpp.find(Path("bench")) == given  # by its name alone


def test_a_program_that_is_no_program_of_this_machine(tmp_path: Path) -> None:
    broken = program(tmp_path / "broken", "\x7fELF")
    for peer in (llama_cpp, vllm):
        with pytest.raises(UserError, match="cannot be run"):
            peer.find(broken)


@needs_gguf
def test_llama_bench_is_asked_in_turn(tmp_path: Path) -> None:
    given = str(bench_program(tmp_path))
    options = ("--prompts", "1,32", "--depths", "0,64", "--batches", "2", "--out", str(tmp_path / "out"))
    shown = run("nano", *options, "--against", "llama.cpp", "--peer", given)
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    rows = {case["name"]: case["peer_tokens_per_second"] for case in found["cases"]}
    assert rows.pop("prompt 1") == pytest.approx(1000, rel=1e-4) and rows.pop("prompt 32") == pytest.approx(1000)
    assert rows.pop("decoding at 0") == rows.pop("decoding at 64") == pytest.approx(1000, rel=1e-4)
    assert set(rows.values()) == {None}  # verifying, and two at once
    assert found["peer"] == {"name": "llama.cpp", "version": "abc (7)"} and "llama.cpp abc (7)" in said(shown)
    asked = asked_of(tmp_path)
    assert {(each["-t"], each["-ngl"], each["-dev"], each["-o"]) for each in asked} == {
        (str(torch.get_num_threads()), "0", "none", "json")
    }
    lengths = [tuple(each[key] for key in ("-p", "-n", "-d")) for each in asked]
    assert lengths[0] == ("1", "0", "0") and lengths[-2:] == [("0", "16", "0"), ("0", "16", "64")]
    assert not Path(asked[0]["-m"]).exists()  # what was written for it is gone


@needs_gguf
def test_short_prompts_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "SECONDS", 0.5)
    subject = Subject(random_model(preset("nano")), None, tmp_path)
    peer = llama_cpp.LlamaCpp(subject, bench_program(tmp_path))
    for tokens, times in ((1, 200), (50, 10), (200, 5), (4000, 1)):
        assert len(peer.measure(Case("prompt", 0, tokens)).seconds) == times, tokens
    (step, *_) = peer.measure(Case("decoding", 8)).seconds
    assert step == pytest.approx(0.001)
    assert not peer.takes(Case("decoding", 16384)) and not peer.takes(Case("verifying", 8, 5))


@needs_gguf
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('sys.exit("loading\\nerror: it is unknown\\n")', "llama-bench failed. Got: error: it is unknown (exit status"),
        ('print("hello"); sys.exit()', "does not answer as llama-bench does. Got: 'hello'"),
        ("print([]); sys.exit()", "does not answer as llama-bench does. Got: '[]'"),
        ("print('[{\"samples_ns\": []}]'); sys.exit()", "does not answer as llama-bench does"),
    ],
)
def test_why_llama_bench_failed_is_told(tmp_path: Path, body: str, says: str) -> None:
    given = str(bench_program(tmp_path, body))
    shown = run("nano", "--prompts", "1", "--depths", "", "--against", "llama.cpp", "--peer", given)
    assert shown.exit_code == 2 and says in said(shown)


def test_the_telling_line_is_told() -> None:
    assert "Got: x.c:3: GGML_ASSERT(a) failed (exit status -6)" in str(
        failed("it", "start\nx.c:3: GGML_ASSERT(a) failed\n#1 main\n\n", -6)
    )
    assert "Got: the end (exit status 1)" in str(failed("it", "start\nthe end\n", 1))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (tiny(n_shared_experts=None), "experts without shared ones"),
        (tiny(num_hidden_layers=4, moe_layer_freq=2), "dense layers after layers with experts"),
        (tiny(V2, topk_method="group_limited_greedy", n_group=4, topk_group=2), "chosen by the best one of each"),
        (tiny(num_hidden_layers=27), "latent queries in 27 layers"),
    ],
)
def test_models_that_llama_cpp_does_not_know(config: ModelConfig, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_known(config)


def test_without_its_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'gguf"):
        our_gguf.check_package()


@pytest.mark.parametrize("peer", ["llama.cpp", "vllm"])
def test_other_models_are_refused(tmp_path: Path, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_gguf, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm, "PROBE", "")
    opener = named(peer, bench_program(tmp_path) if peer == "llama.cpp" else Path(sys.executable))
    plain = random_model(with_plain_attention(tiny(), 4))
    write_checkpoint(random_model(preset("nano")), tmp_path / "nano")
    convert(tmp_path / "nano", tmp_path / "int8", INT8)
    with pytest.raises(UserError, match="knows latent attention alone"):
        opener(Subject(plain, None, tmp_path))
    shown = run(str(tmp_path / "int8"), "--against", peer, "--peer", str(tmp_path / "bench"))
    if peer == "llama.cpp":
        assert shown.exit_code == 2 and "Packed weights cannot be compared with llama.cpp" in said(shown)
    monkeypatch.setattr("cavelight.memory.machine_memory", lambda: 1000)
    with pytest.raises(UserError, match="Memory is too small"):
        opener(Subject(random_model(preset("nano")), None, tmp_path))


def test_memory_has_to_hold_the_model_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("cavelight.bench.peers.subject.check_memory", lambda needed, *_: asked.append(needed))
    check_same("it", preset("nano"), torch.bfloat16)
    assert asked == [2 * 2 * total_parameters(preset("nano"))]


def test_a_small_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="TMPDIR"):
        Subject(random_model(preset("nano")), None, tmp_path).folder()


@needs_gguf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_the_weights_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model(preset("nano"), dtype=dtype)
    write_gguf(model, tmp_path / "model.gguf")
    found = {each.name: each for each in import_module("gguf").GGUFReader(tmp_path / "model.gguf").tensors}
    ours = dict(tensors(model))
    assert found.keys() == ours.keys()
    for name, tensor in ours.items():
        stored = torch.from_numpy(found[name].data.copy()).view(tensor.dtype)
        assert stored.shape == tensor.shape and torch.equal(stored, tensor), name
        assert list(found[name].shape) == list(tensor.shape)[::-1], name


@needs_gguf
def test_weights_of_fp8_are_compared_unpacked(tmp_path: Path) -> None:
    write_checkpoint(random_model(preset("nano"), dtype=torch.bfloat16), tmp_path / "nano")
    convert(tmp_path / "nano", tmp_path / "fp8", FP8)
    options = ("--prompts", "1", "--depths", "", "--batches", "", "--out", str(tmp_path / "out"))
    given = str(bench_program(tmp_path))
    assert run(str(tmp_path / "fp8"), *options, "--against", "llama.cpp", "--peer", given).exit_code == 0


def test_scales_of_yarn() -> None:
    """What the file says makes of cos, sin and softmax what `Yarn` asks for."""
    for mscale, all_dim in ((1.0, 1.0), (0.707, 0.707), (1.0, 0.0), (0.707, 1.0), (1.0, 0.3)):
        turned, multiplier = scales(Yarn(factor=40, original_max_position_embeddings=16, mscale=mscale,
                                         mscale_all_dim=all_dim))  # fmt: skip
        log = 0.1 * float(torch.tensor(40.0).log())
        assert turned == pytest.approx((mscale * log + 1) / (all_dim * log + 1))
        assert turned * (multiplier * log + 1) == pytest.approx(all_dim * log + 1)


@needs_gguf
@pytest.mark.parametrize(("mscale", "all_dim", "told"), [(1.0, 1.0, False), (0.707, 1.0, True), (1.0, 0.0, True)])
def test_scales_of_yarn_are_written(tmp_path: Path, mscale: float, all_dim: float, told: bool) -> None:
    config = tiny(rope_scaling=yarn(16, mscale, all_dim))
    assert config.rope_scaling is not None
    write_gguf(random_model(config), tmp_path / "model.gguf")
    field = import_module("gguf").GGUFReader(tmp_path / "model.gguf").get_field("deepseek2.rope.scaling.attn_factor")
    assert (field is not None) == told
    if field is not None:
        assert field.contents() == pytest.approx(scales(config.rope_scaling)[0])


def logits_of_llama_cpp(file: Path, tokens: list[int], vocabulary: int) -> Tensor:
    """Of every token, in float32 as far as llama.cpp has it, the cache too."""
    engine: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed").llama_cpp
    engine.llama_backend_init()
    asked = engine.llama_model_default_params()
    asked.n_gpu_layers = 0
    model = engine.llama_model_load_from_file(str(file).encode(), asked)
    assert model
    room = engine.llama_context_default_params()
    room.n_ctx, room.n_batch, room.type_k, room.type_v, room.flash_attn_type = 256, len(tokens), 0, 0, 0
    context = engine.llama_init_from_model(model, room)
    batch = engine.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
    assert engine.llama_decode(context, batch) == 0
    size = len(tokens) * vocabulary
    values = ctypes.cast(engine.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * size)).contents
    found = torch.tensor(list(values)).view(len(tokens), vocabulary)
    engine.llama_batch_free(batch)
    engine.llama_free(context)
    engine.llama_model_free(model)
    return found


@needs_gguf
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(tmp_path: Path, name: str) -> None:
    """All logits, after up to 200 tokens, and with them every greedy choice."""
    model = random_model(MODELS[name])
    tokens = some_tokens(model.config, 200)
    write_gguf(model, tmp_path / "model.gguf")
    theirs = logits_of_llama_cpp(tmp_path / "model.gguf", tokens, model.config.vocab_size)
    with torch.no_grad():
        ours = model.logits(torch.tensor(tokens))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_a_real_llama_bench(tmp_path: Path) -> None:
    if shutil.which("llama-bench") is None or find_spec("gguf") is None:
        pytest.skip("llama-bench or the package gguf is not installed")
    options = ("--prompts", "1,32", "--depths", "8", "--batches", "", "--out", str(tmp_path))
    shown = run("nano", *options, "--against", "llama.cpp")
    assert shown.exit_code == 0, shown.output
    rows = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert [row["name"] for row in rows if row["ratio"]] == ["prompt 1", "prompt 32", "decoding at 8"]


@pytest.mark.parametrize("name", ["groups", "groups all open"])
def test_these_models_differ_by_their_groups(name: str) -> None:
    """Or they would not show whether groups are the same there."""
    model: Transformer = random_model(MODELS[name])
    other = Transformer(tiny())
    other.load_state_dict(model.state_dict())
    tokens = torch.tensor(some_tokens(model.config, 200))
    with torch.no_grad():
        assert torch.equal(model.logits(tokens), other.logits(tokens)) == (name == "groups all open")
