"""Checkpoints of every format seen as plain tensors: what is read, what is refused, what other readers make of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from cavelight.errors import UserError
from cavelight.spec.formats import FP8, INT4, INT8, PLAIN, Format
from cavelight.weights.quant import pack, unpack
from cavelight.weights.snapshot import read_checkpoint
from cavelight.weights.stored import Checkpoint

from .packing import Tensors, packable, stored_as, write_folder, write_packed
from .reference.random_weights import random_weights
from .reference.tiny import tiny

CONFIG = tiny()
# Names that are parts of each other, ragged sizes, matrices that are packed and others of the same kind that are not.
MATRICES = {
    "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": (576, 200),
    "model.layers.11.self_attn.kv_a_proj_with_mqa.weight": (130, 64),
    "model.layers.1.mlp.experts.1.up_proj.weight": (1, 33),
    "model.layers.1.mlp.experts.11.up_proj.weight": (257, 64),
}
PLAIN_ONES = {"model.layers.61.mlp.experts.1.up_proj.weight": (150, 33), "model.norm.weight": (300,), "odd": (0, 4)}
FORMATS = [FP8, Format("fp8", ue8m0=True), Format("fp8", (64, 48)), INT8, INT4]


def drawn(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


WEIGHTS = drawn(MATRICES | PLAIN_ONES)


def some(format: Format) -> Tensors:
    return stored_as(WEIGHTS, format, MATRICES.__contains__)


def written(folder: Path, format: Format, tensors: Tensors | None = None, shard_bytes: int = 2**30) -> Checkpoint:
    return Checkpoint(write_folder(folder, CONFIG, some(format) if tensors is None else tensors, format, shard_bytes))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shard_bytes", [1, 2**30], ids=["a shard each", "one file"])
def test_packed_matrices_are_seen_plain(tmp_path: Path, format: Format, shard_bytes: int) -> None:
    checkpoint = written(tmp_path, format, shard_bytes=shard_bytes)
    assert (checkpoint.format, checkpoint.config.hidden_size) == (format, CONFIG.hidden_size)
    assert checkpoint.raw["quantization_config"] == format.quantization_config(["lm_head"])
    assert checkpoint.shapes == MATRICES | PLAIN_ONES
    assert {name for name in checkpoint.shapes if checkpoint.is_packed(name)} == MATRICES.keys()
    for name, x in WEIGHTS.items():
        assert checkpoint.dtype(name) == torch.bfloat16
        plain = unpack(pack(x, format), format, torch.float32) if name in MATRICES else x.float()
        assert torch.equal(checkpoint.tensor(name, torch.float32), plain), name
        assert torch.equal(checkpoint.tensor(name), plain.bfloat16()), name


@pytest.mark.parametrize("format", [PLAIN, *FORMATS], ids=str)
def test_blocks_are_the_tensor_in_pieces(tmp_path: Path, format: Format) -> None:
    checkpoint = written(tmp_path, format)
    for name, shape in checkpoint.shapes.items():
        blocks = list(checkpoint.blocks(name, limit_bytes=4 * 256 * 64))
        starts = [start for start, _ in blocks]
        assert starts == sorted(starts) and all(start % 128 == 0 for start in starts)
        assert sum(len(rows) for _, rows in blocks) == shape[0]
        assert all(rows[0].numel() * len(rows) <= max(256 * 64, 128 * rows[0].numel()) for _, rows in blocks)
        if blocks:
            assert torch.equal(torch.cat([rows for _, rows in blocks]), checkpoint.tensor(name))
    assert len(list(checkpoint.blocks("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", 1))) == 5


@given(st.sampled_from(sorted(MATRICES)), st.sampled_from(FORMATS), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_can_be_read(tmp_path: Path, name: str, format: Format, data: st.DataObject) -> None:
    folder = tmp_path / str(FORMATS.index(format))
    checkpoint = Checkpoint(folder) if folder.exists() else written(folder, format)
    stop = data.draw(st.integers(0, MATRICES[name][0]))
    start = data.draw(st.integers(0, stop))
    assert torch.equal(checkpoint.rows(name, start, stop), checkpoint.tensor(name)[start:stop])


def test_only_the_rows_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path, FP8)
    asked = []
    rows = checkpoint.files.rows
    monkeypatch.setattr(checkpoint.files, "rows", lambda *which: asked.append(which) or rows(*which))
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    checkpoint.rows(name, 300, 310)
    assert asked == [(name, 256, 310), (f"{name}_scale_inv", 2, 3)]


def test_scales_of_other_dtypes(tmp_path: Path) -> None:
    """As some store them: powers of two in a byte each, or in bfloat16."""
    format = Format("fp8", ue8m0=True)
    plain = written(tmp_path / "float32", format)
    for dtype in (torch.float8_e8m0fnu, torch.bfloat16):
        tensors = {n: t.to(dtype) if n.endswith("_scale_inv") else t for n, t in some(format).items()}
        checkpoint = written(tmp_path / str(dtype), format, tensors)
        assert checkpoint.files.entries["model.layers.1.mlp.experts.1.up_proj.weight_scale_inv"].dtype == dtype
        assert all(torch.equal(checkpoint.tensor(name), plain.tensor(name)) for name in MATRICES)


def test_integers_keep_the_dtype_of_their_scales(tmp_path: Path) -> None:
    tensors = stored_as(WEIGHTS, INT4, MATRICES.__contains__, torch.float32)
    tensors = {n: t.int() if n.endswith("_shape") else t for n, t in tensors.items()}  # as some store it
    checkpoint = written(tmp_path, INT4, tensors)
    assert {checkpoint.dtype(name) for name in WEIGHTS} == {torch.float32}
    name = "model.layers.1.mlp.experts.11.up_proj.weight"
    assert torch.equal(checkpoint.tensor(name), unpack(pack(WEIGHTS[name].float(), INT4), INT4, torch.float32))


# What must be refused

NAME = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
Damage = Callable[[Tensors], Any]


def put(suffix: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.update({NAME + suffix: change(tensors[NAME + suffix])})


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def change(scale: Tensor) -> Tensor:
        scale = scale.clone()
        scale.view(-1)[1] = value
        return scale

    return change


@pytest.mark.parametrize(
    ("format", "damage", "message"),
    [
        (FP8, lambda t: t.pop(NAME + "_scale_inv"), f"do not add up. Got: {NAME} without {NAME}_scale_inv"),
        (FP8, lambda t: t.pop(NAME), f"Got: {NAME}_scale_inv without {NAME}"),
        (FP8, put("", lambda t: t.bfloat16()), f"{NAME}_scale_inv without the fp8 values of {NAME}"),
        (FP8, put("_scale_inv", lambda t: t[:4]), r"_scale_inv is \[4, 2\], not \[5, 2\].*each block of 128 x 128"),
        (FP8, put("_scale_inv", lambda t: t.T.contiguous()), r"is \[2, 5\], not \[5, 2\]"),
        (FP8, put("_scale_inv", lambda t: t.view(torch.int32)), "_scale_inv is torch.int32"),
        (FP8, put("", lambda t: t[None]), r"is \[1, 576, 200\]"),
        (INT4, lambda t: t.pop(NAME + "_scale"), f"{NAME}_packed without {NAME}_scale"),
        (INT4, lambda t: t.pop(NAME + "_packed"), f"{NAME}_scale without {NAME}_packed"),
        (INT4, lambda t: t.pop(NAME + "_shape"), f"without {NAME}_shape"),
        (INT4, lambda t: t.update({NAME: WEIGHTS[NAME]}), f"{NAME}_packed and {NAME}, one matrix twice"),
        (INT4, put("_scale", lambda t: t.to(torch.float8_e8m0fnu)), "_scale is torch.float8_e8m0fnu"),
        (INT4, put("_shape", lambda t: t + 8), r"_packed is \[576, 25\], not \[584, 26\]"),
        (INT4, put("_shape", lambda t: t * 10**9), r"not \[576000000000,"),
        (INT4, put("_shape", lambda t: -t), r"is \[-576, -200\]"),
        (INT4, put("_shape", lambda t: t.float()), "does not tell the two sizes"),
        (INT4, put("_scale", lambda t: t[:, :6].contiguous()), r"_scale is \[576, 6\], not \[576, 7\]"),
        (INT4, put("_packed", lambda t: t.view(torch.float32)), "_packed is torch.float32"),
        (INT8, put("_packed", lambda t: t[:, :49].contiguous()), r"is \[576, 49\], not \[576, 50\]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tmp_path: Path, format: Format, damage: Damage, message: str) -> None:
    tensors = some(format)
    damage(tensors)
    with pytest.raises(UserError, match=message):
        written(tmp_path, format, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize(("format", "suffix"), [(FP8, "_scale_inv"), (INT8, "_scale"), (INT4, "_scale")])
def test_scales_that_cannot_be(tmp_path: Path, format: Format, suffix: str, value: float) -> None:
    tensors = some(format)
    put(suffix, poisoned(value))(tensors)
    checkpoint = written(tmp_path, format, tensors)
    with pytest.raises(UserError, match=rf"{NAME}{suffix} holds scales that are not finite and positive. Got: 1 of"):
        checkpoint.tensor(NAME)


@pytest.mark.parametrize(("stored", "said"), [(FP8, PLAIN), (FP8, INT8), (INT4, PLAIN), (INT4, FP8)], ids=str)
def test_config_json_has_to_say_what_is_stored(tmp_path: Path, stored: Format, said: Format) -> None:
    write_folder(tmp_path, CONFIG, some(stored), said)
    with pytest.raises(UserError, match=r"its config.json does not describe.*4 such as model.layers"):
        Checkpoint(tmp_path)


def test_what_belongs_to_no_matrix_is_left_over(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    stored = stored_as(weights, INT4, packable(CONFIG).__contains__)
    stored["model.layers.0.mlp.up_proj.weight_offset"] = torch.zeros(1, 1)
    folder = write_folder(tmp_path, CONFIG, stored, INT4)
    assert "model.layers.0.mlp.up_proj.weight_offset" in Checkpoint(folder).shapes
    with pytest.raises(UserError, match=r"1 left over \(model.layers.0.mlp.up_proj.weight_offset\)"):
        read_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.int32, torch.float64], ids=str)
@pytest.mark.parametrize("format", [PLAIN, FP8, INT4], ids=str)
def test_plain_weights_are_plain_numbers(tmp_path: Path, format: Format, dtype: torch.dtype) -> None:
    tensors = some(format) | {"model.norm.weight": torch.ones(300).to(dtype)}
    with pytest.raises(UserError, match=f"model.norm.weight in .* is {str(dtype).removeprefix('torch.')}"):
        written(tmp_path, format, tensors)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        Checkpoint(tmp_path / "deepseek-v3")


# What other readers make of it


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorch_reads_our_fp8(tmp_path: Path) -> None:
    """Ragged blocks, and scales in other shards than their values."""
    ours = written(tmp_path, FP8, shard_bytes=1)
    read = {name: torch.empty(shape) for name, shape in ours.shapes.items() if 0 not in shape}
    dcp.load(read, storage_reader=QuantizedHuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in read.items():
        assert torch.equal(tensor, ours.tensor(name, torch.float32)), name


@pytest.mark.parametrize("format", [FP8, Format("fp8", ue8m0=True)], ids=str)
def test_transformers_reads_our_fp8(tmp_path: Path, format: Format) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = write_packed(tmp_path, CONFIG, random_weights(CONFIG), format)
    said = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype=torch.float32).state_dict()
    checkpoint, seen = Checkpoint(folder), 0
    for name in packable(CONFIG):
        ours = checkpoint.tensor(name, torch.float32)
        if ".experts." in name:
            stack, expert, matrix, _ = name.rsplit(".", 3)
            kind = "down_proj" if matrix == "down_proj" else "gate_up_proj"
            part = theirs[f"{stack}.{kind}"][int(expert)]
            tensor = part if kind == "down_proj" else part.chunk(2)[matrix == "up_proj"]
        else:
            tensor = theirs[name]
        assert torch.equal(tensor.float(), ours), name
        seen += 1
    assert seen == 40


def test_config_json_is_kept_as_it_stands(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, FP8)
    assert checkpoint.raw == json.loads((tmp_path / "config.json").read_text())
