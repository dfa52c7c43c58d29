"""Formats: what config.json says of them, in both directions, and what a packed matrix consists of."""

from typing import Any

import pytest
import torch

from cavelight.errors import UserError
from cavelight.spec import cost
from cavelight.spec.formats import FP8, INT4, INT8, PACKED_ROLES, PLAIN, Format, named
from cavelight.spec.presets import preset
from cavelight.spec.shapes import parameters
from cavelight.weights.headers import CODES
from cavelight.weights.quant import pack

V3 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
WEIGHTS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 32,
    "num_bits": 4,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "group",
    "symmetric": True,
    "type": "int",
}
GROUP = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": WEIGHTS}
# As released checkpoints have it that pack their routed experts alone.
EXPERTS_ONLY = {
    "config_groups": {"group_0": GROUP},
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
FORMATS = [PLAIN, FP8, Format("fp8", ue8m0=True), Format("fp8", (64, 32)), INT8, INT4, Format("int", bits=8, group=128)]


def grouped(**changes: Any) -> dict[str, Any]:
    return EXPERTS_ONLY | {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | changes}}}


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_written_is_read_back(format: Format) -> None:
    assert Format.of(format.quantization_config(["lm_head"])) == format


def test_what_config_json_says() -> None:
    assert PLAIN.quantization_config(["lm_head"]) is None
    assert FP8.quantization_config() == V3
    assert Format("fp8", ue8m0=True).quantization_config(["a.b"]) == V3 | {
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["a.b"],
    }
    written = INT4.quantization_config(["lm_head"])
    assert written is not None
    weights = written["config_groups"]["group_0"]["weights"]
    assert weights.items() <= WEIGHTS.items()
    assert (written["format"], written["ignore"]) == ("pack-quantized", ["lm_head"])


@pytest.mark.parametrize(
    ("config", "format"),
    [
        (None, PLAIN),
        ({}, PLAIN),
        (V3, FP8),
        (V3 | {"scale_fmt": "ue8m0"}, Format("fp8", ue8m0=True)),
        ({"quant_method": "fp8", "scale_fmt": "float", "modules_to_not_convert": ["lm_head"]}, FP8),
        (EXPERTS_ONLY, INT4),
        (grouped(num_bits=8, strategy="channel", group_size=None), INT8),
        (grouped(strategy="channel", group_size=-1), Format("int", bits=4)),
        (EXPERTS_ONLY | {"config_groups": {"a": GROUP, "b": GROUP | {"targets": ["re:.*mlp.*"]}}}, INT4),
    ],
)
def test_what_others_write_is_read(config: dict[str, Any] | None, format: Format) -> None:
    assert Format.of(config) == format


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method .*Got: 'gptq'"),
        ({"bits": 4}, "quant_method .*Got: None"),
        (V3 | {"fmt": "e5m2"}, "fmt .*Got: 'e5m2'"),
        (V3 | {"weight_block_size": None}, "weight_block_size"),
        (V3 | {"weight_block_size": [128, 0]}, "weight_block_size"),
        (V3 | {"weight_block_size": 128}, "weight_block_size"),
        (V3 | {"scale_fmt": "e5m3"}, "scale_fmt"),
        (V3 | {"expert_dtype": "fp4"}, "expert_dtype"),
        (EXPERTS_ONLY | {"format": "int-quantized"}, "format .*Got: 'int-quantized'"),
        (EXPERTS_ONLY | {"config_groups": {}}, "config_groups"),
        (
            EXPERTS_ONLY | {"config_groups": {"a": GROUP, "b": grouped(num_bits=8)["config_groups"]["group_0"]}},
            "same way",
        ),
        (EXPERTS_ONLY | {"config_groups": {"a": GROUP | {"input_activations": {"num_bits": 8}}}}, "activations"),
        (EXPERTS_ONLY | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (EXPERTS_ONLY | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        (grouped(symmetric=False), "config_groups"),
        (grouped(num_bits=3), "config_groups"),
        (grouped(type="float"), "config_groups"),
        (grouped(actorder="group"), "config_groups"),
        (grouped(group_size=None), "config_groups"),
        (grouped(strategy="tensor", group_size=None), "config_groups"),
        (EXPERTS_ONLY | {"config_groups": {"a": None}}, "config_groups"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"has a .*{key}"):
        Format.of(config)


def test_names_of_formats() -> None:
    assert [named(to) for to in ("hf", "fp8", "int8", "int4")] == [PLAIN, FP8, INT8, INT4]
    with pytest.raises(UserError, match=r"'int5' is no format.*hf, fp8, int8, int4"):
        named("int5")


@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
@pytest.mark.parametrize("shape", [(576, 100), (1, 7), (128, 256), (129, 33)], ids=str)
def test_companions_are_what_packing_makes(format: Format, shape: tuple[int, int]) -> None:
    stored = pack(torch.randn(shape).bfloat16(), format)
    companions = {part.name: part for part in format.companions("x.weight", shape)}
    assert companions.keys() == {f"x.{suffix}" for suffix in stored}
    for suffix, tensor in stored.items():
        part = companions[f"x.{suffix}"]
        assert (part.shape, part.code) == (tuple(tensor.shape), CODES[tensor.dtype])
    sizes = [tensor.nbytes for suffix, tensor in stored.items() if suffix != "weight_shape"]
    assert format.nbytes(shape) == sum(sizes)
    assert format.nbytes((3, *shape)) == 3 * sum(sizes)  # a stack is packed matrix by matrix


def test_bytes_by_hand() -> None:
    assert PLAIN.nbytes((3, 5)) == 30
    assert FP8.nbytes((576, 7168)) == 576 * 7168 + 4 * 5 * 56
    assert INT8.nbytes((4, 10)) == 4 * 12 + 4 * 2
    assert INT4.nbytes((4, 33)) == 4 * 20 + 4 * 2 * 2


def test_bytes_of_whole_models() -> None:
    """V3's matrices are whole groups and blocks, so the sums are simple."""
    config = preset("deepseek-v3")
    packed = sum(p.size for p in parameters(config) if p.role in PACKED_ROLES)
    plain = cost.weight_bytes(config) - 2 * packed
    assert cost.weight_bytes(config, "int4") == plain + packed // 2 + 2 * packed // 32
    rows = sum(p.size // p.shape[-1] for p in parameters(config) if p.role in PACKED_ROLES)
    assert cost.weight_bytes(config, "int8") == plain + packed + 2 * rows
