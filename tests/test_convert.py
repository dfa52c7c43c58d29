"""Conversion: what is written, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cavelight.cli.convert import bytes_in
from cavelight.cli.main import app
from cavelight.errors import UserError
from cavelight.spec.formats import FP8, INT4, INT8, PLAIN, Format
from cavelight.weights import convert as converting
from cavelight.weights import worklist
from cavelight.weights.audit import Report
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import read_checkpoint
from cavelight.weights.stored import Checkpoint

from .conversions import (
    BIAS,
    CONFIG,
    COPY,
    DOWN,
    FORMATS,
    HEAD_COPY,
    change,
    content,
    equal,
    folder_of,
    tensors_of,
    weights,
    write,
)
from .reference.random_weights import random_weights


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", weights())


# What is written


def test_plain_to_plain_is_a_copy_of_every_byte_but_the_biases(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", PLAIN)
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    biases = {name for name in old if name.endswith("correction_bias")}
    assert report.rules == {"copied": len(old) - 2, "bias shifted": 2} and len(biases) == 2
    for name in biases:
        assert float(new[name].min()) == 0 and torch.equal(new[name], old[name] - old[name].min())
    assert equal({n: t for n, t in old.items() if n not in biases}, {n: t for n, t in new.items() if n not in biases})
    convert(source, tmp_path / "kept", PLAIN, shift_biases=False)
    assert equal(old, tensors_of(tmp_path / "kept"))


@pytest.mark.parametrize("to", FORMATS)
def test_packed_formats_and_back(source: Path, tmp_path: Path, to: str) -> None:
    report = convert(source, tmp_path / to, FORMATS[to])
    packed = Checkpoint(tmp_path / to)
    assert packed.format == FORMATS[to] and packed.is_packed(DOWN) and not packed.is_packed("lm_head.weight")
    assert set(report.largest_error) == {"attention", "dense", "expert", "shared_expert"}
    assert report.rules["quantised"] == sum(packed.is_packed(name) for name in packed.shapes)
    back = convert(tmp_path / to, tmp_path / "back", PLAIN)
    assert back.rules == {
        "copied": len(packed.shapes) - report.rules["quantised"],
        "unquantised": report.rules["quantised"],
    }
    plain = tensors_of(tmp_path / "back")
    assert {t.dtype for n, t in plain.items() if not n.endswith("bias")} == {torch.bfloat16}
    assert equal(plain, {name: packed.tensor(name) for name in packed.shapes})
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    read_checkpoint(tmp_path / "back")


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_format_again_is_the_same_bytes(source: Path, tmp_path: Path, to: str) -> None:
    convert(source, tmp_path / "once", FORMATS[to])
    again = convert(tmp_path / "once", tmp_path / "twice", FORMATS[to])
    assert set(again.rules) == {"copied"}
    once, twice = content(tmp_path / "once"), content(tmp_path / "twice")
    assert once.pop("conversion.json") != twice.pop("conversion.json")  # its source is another
    assert once == twice


def test_powers_of_two_stay_when_fp8_is_copied(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "v31", Format("fp8", ue8m0=True))
    assert convert(tmp_path / "v31", tmp_path / "again", FP8).rules == {"copied": len(weights())}
    assert equal(tensors_of(tmp_path / "v31"), tensors_of(tmp_path / "again"))
    raw = json.loads((tmp_path / "again/config.json").read_text())
    assert raw["quantization_config"]["scale_fmt"] == "ue8m0"


def test_scales_stored_in_bytes_are_widened(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "v31", Format("fp8", ue8m0=True))
    wide = tensors_of(tmp_path / "v31")
    narrow = {n: t.to(torch.float8_e8m0fnu) if n.endswith("scale_inv") else t for n, t in wide.items()}
    save_file(narrow, tmp_path / "v31/model.safetensors")
    assert set(convert(tmp_path / "v31", tmp_path / "out", FP8).rules) == {"copied"}
    assert equal(wide, tensors_of(tmp_path / "out"))


def test_from_one_packed_format_to_another(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "fp8", FP8)
    assert convert(tmp_path / "fp8", tmp_path / "int8", INT8).rules["requantised"] == 48
    close = Checkpoint(tmp_path / "int8").tensor(DOWN, torch.float32) - tensors_of(source)[DOWN].float()
    assert float(close.abs().max()) < 0.05


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_another_dtype(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    source = write(tmp_path / "source", weights(stored))
    report = convert(source, tmp_path / "out", PLAIN, dtype=dtype)
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    matrices = [name for name in old if not name.endswith("bias")]
    assert bool(report.largest_error) == any(not torch.equal(new[name].to(stored), old[name]) for name in matrices)
    assert all(torch.equal(new[name], old[name].to(dtype)) for name in old if not name.endswith("bias"))
    assert new[BIAS].dtype == torch.float32
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_bias_in_bfloat16_becomes_float32(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random_weights(CONFIG, dtype=torch.bfloat16))
    assert convert(source, tmp_path / "out", PLAIN, shift_biases=False).rules["cast"] == 2
    assert tensors_of(tmp_path / "out")[BIAS].dtype == torch.float32


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    """One expert is float32 among others in bfloat16."""
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    source = write(tmp_path / "source", weights() | {name: random_weights(CONFIG)[name]})
    assert convert(source, tmp_path / "out", PLAIN, shift_biases=False).rules == {"copied": len(weights())}
    assert equal(tensors_of(source), tensors_of(tmp_path / "out"))


def test_copies_and_derived_tensors(tmp_path: Path) -> None:
    """Copies are added where they lack, derived tensors go, and both are said."""
    tensors = weights()
    derived = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = write(
        tmp_path / "source", {n: t for n, t in tensors.items() if n not in (COPY, HEAD_COPY)} | {derived: torch.ones(4)}
    )
    report = convert(source, tmp_path / "out", FP8)
    new = tensors_of(tmp_path / "out")
    assert torch.equal(new[COPY], tensors["model.embed_tokens.weight"]) and derived not in new
    assert (report.rules["MTP copy added"], report.rules["derived, dropped"]) == (2, 1)


def test_without_mtp(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", INT8, without_mtp=True)
    assert report.rules["MTP, dropped"] == sum(name.startswith("model.layers.2.") for name in weights())
    assert len(read_checkpoint(tmp_path / "out").mtp) == 0


def test_blocks_of_any_size_give_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for to in ("fp8", "int4"):
        convert(source, tmp_path / f"{to}-whole", FORMATS[to])
    monkeypatch.setattr(worklist, "BLOCK_BYTES", 1)
    for to in ("fp8", "int4"):
        convert(source, tmp_path / f"{to}-parts", FORMATS[to])
        assert content(tmp_path / f"{to}-whole") == content(tmp_path / f"{to}-parts")
        convert(tmp_path / f"{to}-parts", tmp_path / f"{to}-again", FORMATS[to])
        assert equal(tensors_of(tmp_path / f"{to}-parts"), tensors_of(tmp_path / f"{to}-again"))


def test_shards_and_their_index(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", FP8, shard_bytes=100_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    convert(source, tmp_path / "one", FP8)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "one"))


# The other files


def test_files_beside_the_weights(source: Path, tmp_path: Path) -> None:
    for name in (
        "tokenizer.json",
        "tiktoken.model",
        "tokenization_x.py",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "README.md",
    ):
        (source / name).write_text(f"the {name}")
    for name in ("modeling.py", "hf_token", "tokens.bin"):
        (source / name).write_text("pass")
    (source / "figures").mkdir()
    report = convert(source, tmp_path / "out", FP8)
    tokenizer = ["tiktoken.model", "tokenization_x.py", "tokenizer.json"]
    assert report.files == ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", *tokenizer]
    assert report.left_behind == ["figures", "hf_token", "modeling.py", "tokens.bin"]
    assert (tmp_path / "out/LICENSE").read_text() == "the LICENSE"
    assert Report.read(tmp_path / "out") == report
    convert(source, tmp_path / "out", INT8)  # replaces all of it, licence and all
    assert Checkpoint(tmp_path / "out").format == INT8
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"something other than a checkpoint. Got: thesis.tex"):
        convert(source, tmp_path / "out", INT8)


@pytest.mark.parametrize("comes", [True, False])
def test_code_comes_along_where_it_is_whole(tmp_path: Path, comes: bool) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    source = write(tmp_path / "source", weights(), auto_map=auto_map)
    (source / "configuration_x.py").write_text("pass")
    if comes:
        (source / "modeling_x.py").write_text("pass")
    report = convert(source, tmp_path / "out", PLAIN)
    assert (tmp_path / "out/configuration_x.py").exists() == comes
    assert json.loads((tmp_path / "out/config.json").read_text()).get("auto_map") == (auto_map if comes else None)
    assert report.left_behind == ([] if comes else ["configuration_x.py"])


def test_the_configuration_says_what_readers_need(source: Path, tmp_path: Path) -> None:
    raw = json.loads((source / "config.json").read_text())
    for key in ("scoring_func", "topk_method", "moe_layer_freq"):  # transformers leaves these out
        del raw[key]
    (source / "config.json").write_text(json.dumps(raw))
    convert(source, tmp_path / "out", INT4)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert (raw["scoring_func"], raw["topk_method"], raw["moe_layer_freq"]) == ("sigmoid", "noaux_tc", 1)
    assert raw["torch_dtype"] == "bfloat16"
    assert raw["quantization_config"]["ignore"] == [
        "model.layers.1.mlp.gate",
        "lm_head",
        "model.layers.2.eh_proj",
        "model.layers.2.mlp.gate",
        "model.layers.2.shared_head.head",
    ]


# Refused


def test_target_and_source_are_apart(source: Path, tmp_path: Path) -> None:
    for target in (source, source / "fp8", tmp_path / "x/../source"):
        with pytest.raises(UserError, match="have to be different folders"):
            convert(source, target, FP8)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="something other than a checkpoint"):
        convert(source, tmp_path / "notes.txt", FP8)
    with pytest.raises(UserError, match="have to be different folders"):
        convert(source, tmp_path, FP8)
    (tmp_path / "taken/my.safetensors").mkdir(parents=True)  # a folder, whatever its name
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in (tmp_path / "taken", tmp_path / "loop"):
        with pytest.raises(UserError, match=r"something other than a checkpoint. Got: (my.safetensors|loop)"):
            convert(source, target, FP8)


def test_what_the_source_is_a_view_of_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "view").mkdir()
    for file in source.iterdir():
        (tmp_path / "view" / file.name).symlink_to(file)
    with pytest.raises(UserError, match="have to be different folders"):
        convert(tmp_path / "view", source, INT4)


def test_where_a_disk_is_mounted_nothing_is_begun(source: Path) -> None:
    with pytest.raises(UserError, match="where a disk is mounted"):
        convert(source, Path("/dev"), FP8)


def test_scales_in_a_wider_dtype_are_the_same_scales(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "int4", INT4)
    report = convert(tmp_path / "int4", tmp_path / "out", INT4, dtype=torch.float32)
    assert report.rules["copied"] == 50 and "requantised" not in report.rules
    before, after = tensors_of(tmp_path / "int4"), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[DOWN + part], before[DOWN + part]) for part in ("_packed", "_scale"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [DOWN, "lm_head.weight", BIAS])
def test_numbers_that_are_not_finite(source: Path, tmp_path: Path, name: str, value: float) -> None:
    tensor = weights()[name].clone()
    tensor.view(-1)[3] = value
    change(source, **{name.replace(".", "__"): tensor})
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite. Got: 1 of"):
        convert(source, tmp_path / "out", FP8)


@pytest.mark.parametrize("part", ["", "_scale_inv"])
def test_fp8_that_is_not_finite_is_not_copied(source: Path, tmp_path: Path, part: str) -> None:
    convert(source, tmp_path / "fp8", FP8)
    tensor = load_file(tmp_path / "fp8/model.safetensors")[DOWN + part]
    tensor.view(torch.uint8).view(-1)[:4] = 0xFF  # NaN either way
    change(tmp_path / "fp8", **{(DOWN + part).replace(".", "__"): tensor})
    with pytest.raises(UserError, match=f"{DOWN}{part} holds .* not finite"):
        convert(tmp_path / "fp8", tmp_path / "out", FP8)


def test_numbers_too_large_for_float16(source: Path, tmp_path: Path) -> None:
    tensor = weights()[DOWN].clone()
    tensor[5, 7] = -70_000.0
    change(source, **{DOWN.replace(".", "__"): tensor})
    convert(source, tmp_path / "fp8", FP8)
    for folder in (source, tmp_path / "fp8"):
        with pytest.raises(UserError, match=rf"{DOWN} does not fit float16. Got: values up to 7[01],\d+; .* 65,504"):
            convert(folder, tmp_path / f"{folder.name}-16", PLAIN, dtype=torch.float16)
        with pytest.raises(UserError, match=f"{DOWN} holds numbers that are not finite. Got: 1 of .* as float16"):
            read_checkpoint(folder, torch.float16)


def test_numbers_too_small_for_float16(source: Path, tmp_path: Path) -> None:
    change(source, **{DOWN.replace(".", "__"): weights()[DOWN] * 1e-9})
    with pytest.raises(UserError, match=f"{DOWN} does not fit float16. Got: values of .*e-.* all become zero"):
        convert(source, tmp_path / "out", PLAIN, dtype=torch.float16)


def test_a_copy_that_is_none(source: Path, tmp_path: Path) -> None:
    change(source, **{COPY.replace(".", "__"): weights()["lm_head.weight"]})
    with pytest.raises(UserError, match=f"{COPY} is not a copy of model.embed_tokens.weight.*without-mtp"):
        convert(source, tmp_path / "out", PLAIN)
    convert(source, tmp_path / "without", PLAIN, without_mtp=True)


@pytest.mark.parametrize(
    ("change_it", "message"),
    [
        (
            {"model__norm__weight": torch.ones(160, dtype=torch.int64)},
            "model.norm.weight in .* is int64",
        ),
        ({"model__norm__weight": torch.ones(161)}, r"1 of another shape \(model.norm.weight"),
        ({"model__layers__0__extra": torch.ones(1)}, r"1 left over \(model.layers.0.extra\)"),
    ],
)
def test_weights_that_are_not_the_configured_model(
    source: Path, tmp_path: Path, change_it: dict[str, Tensor], message: str
) -> None:
    change(source, **change_it)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", PLAIN)
    assert not folder_of(tmp_path / "out").exists()


# The command


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command(source: Path, tmp_path: Path) -> None:
    shown = call(source, tmp_path / "fp8", "--to", "fp8", "--scale-fmt", "ue8m0", "--shard-size", "100kB")
    assert shown.exit_code == 0, shown.output
    assert "quantised" in shown.output and "audited" in shown.output
    assert Checkpoint(tmp_path / "fp8").format == Format("fp8", ue8m0=True)
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    shown = call(tmp_path / "fp8", tmp_path / "int4", "--to", "int4", "--group", "64", "--dtype", "float16", "--json")
    lines = [json.loads(line) for line in shown.output.splitlines()]
    assert (lines[0]["kind"], lines[0]["unit"]) == ("phase", "B")
    assert (lines[-1]["kind"], lines[-1]["rules"]["requantised"]) == ("result", 48)
    assert Checkpoint(tmp_path / "int4").format == Format("int", bits=4, group=64)
    assert Checkpoint(tmp_path / "int4").dtype(DOWN) == torch.float16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "gguf"], "'gguf' is no format"),
        (["--dtype", "int8"], "There is no dtype 'int8'"),
        (["--scale-fmt", "bf16"], "There is no scale format 'bf16'"),
        (["--to", "int4", "--group", "20"], "20 weights cannot share a scale"),
        (["--shard-size", "4 apples"], "'4 apples' is no size of a file"),
        (["--shard-size", "0"], "'0' is no size of a file"),
        (["--shard-size", "9" * 400], "is no size of a file"),
        (["--to", "int8", "--group", "64"], "--to int8 has no groups"),
        (["--to", "int4", "--scale-fmt", "ue8m0"], "--to int4 has none of them"),
    ],
)
def test_mistakes_on_the_command_line(source: Path, tmp_path: Path, options: list[str], says: str) -> None:
    shown = call(source, tmp_path / "out", *options)
    assert shown.exit_code == 2 and says in shown.output
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "audit", interrupted)
    shown = call(source, tmp_path / "out")
    assert shown.exit_code == 130 and "the same command goes on" in shown.output
    monkeypatch.undo()
    assert call(source, tmp_path / "out").exit_code == 0


def test_a_run_of_ours_is_converted(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    source.rename(tmp_path / "run/model")
    assert call(tmp_path / "run", tmp_path / "out", "--without-mtp").exit_code == 0
    assert Checkpoint(tmp_path / "out").config.num_nextn_predict_layers == 0


@pytest.mark.parametrize(("text", "size"), [("4GiB", 2**32), ("500MB", 500_000_000), ("1.5k", 1500), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert bytes_in(text) == size
