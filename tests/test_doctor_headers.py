"""The doctor on configurations and headers that were broken on purpose: no weight is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cavelight.doctor import configuration, headers
from cavelight.doctor.case import Case, open_case
from cavelight.doctor.examine import examine
from cavelight.doctor.findings import Finding
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import FP8, INT4, PLAIN
from cavelight.spec.presets import preset, preset_names
from cavelight.weights.files import INDEX, Safetensors

from .packing import packable, stored_as, write_folder
from .patients import WHOLE, Break, Patient, not_passed, patient
from .reference.tiny import V2, tiny, yarn

MTP = "model.layers.9"


def keys(**changes: Any) -> Break:
    """Change keys of config.json; None removes one."""

    def break_it(broken: Patient) -> None:
        broken.raw = {key: value for key, value in (broken.raw | changes).items() if value is not None}

    return break_it


def rope(**changes: Any) -> Break:
    return keys(rope_scaling={k: v for k, v in (yarn(64) | changes).items() if v is not None})


def without(*endings: str) -> Break:
    def break_it(broken: Patient) -> None:
        broken.tensors = {name: tensor for name, tensor in broken.tensors.items() if not name.endswith(endings)}

    return break_it


def renamed(old: str, new: str) -> Break:
    def break_it(broken: Patient) -> None:
        broken.tensors = {name.replace(old, new): tensor for name, tensor in broken.tensors.items()}

    return break_it


def cast(ending: str, dtype: torch.dtype) -> Break:
    def break_it(broken: Patient) -> None:
        for name in [name for name in broken.tensors if name.endswith(ending)]:
            broken.tensors[name] = broken.tensors[name].to(dtype)

    return break_it


def misshapen(broken: Patient) -> None:
    broken.tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(47, 64)


BROKEN: dict[str, tuple[str, str, int | None, Break]] = {
    "no JSON key": ("config", "fail", None, keys(hidden_size=None)),
    "odd rotary width": ("rotary-dims", "fail", 1, keys(qk_rope_head_dim=7)),
    "halves asked for": ("rotary-dims", "fail", 1, keys(rope_interleave=False)),
    "no rope_type": ("yarn", "fail", 2, rope(type=None)),
    "rope_type default": ("yarn", "fail", 2, rope(type=None, rope_type="default")),
    "no mscale_all_dim": ("yarn", "warn", 2, rope(mscale_all_dim=None)),
    "no mscale": ("yarn", "warn", 2, rope(mscale=None)),
    "two mscales": ("yarn", "warn", 2, rope(mscale=1.0, mscale_all_dim=0.707)),
    "beyond YaRN's reach": ("yarn", "warn", 2, rope(original_max_position_embeddings=16)),
    "uneven groups": ("group-limit", "fail", 3, keys(n_group=3)),
    "more groups kept than there are": ("group-limit", "fail", 3, keys(topk_group=5)),
    "groups of one": ("group-limit", "fail", 3, keys(n_group=8, topk_group=4)),
    "too few to choose from": ("group-limit", "fail", 3, keys(num_experts_per_tok=5)),
    "all groups kept": ("group-limit", "warn", 3, keys(topk_group=2)),
    "weights not normalised": ("gate", "warn", 4, keys(norm_topk_prob=False)),
    "no scaling factor": ("gate", "warn", 4, keys(routed_scaling_factor=1.0)),
    "softmax for V3": ("gate", "fail", 4, keys(scoring_func="softmax")),
    "greedy for V3": ("gate", "fail", 4, keys(topk_method="greedy")),
    "gate not written": ("keys", "warn", 4, keys(scoring_func=None, topk_method=None, moe_layer_freq=None)),
    "unknown quantisation": ("format", "fail", None, keys(quantization_config={"quant_method": "gptq"})),
    "tensor missing": ("shapes", "fail", None, without("layers.0.self_attn.o_proj.weight")),
    "tensor left over": ("shapes", "fail", None, renamed("layers.0.self_attn.o_proj", "layers.0.self_attn.out")),
    "tensor misshapen": ("shapes", "fail", None, misshapen),
    "layer beyond the last": (
        "shapes",
        "fail",
        None,
        renamed("layers.0.self_attn.o_proj", "layers.12.self_attn.o_proj"),
    ),
    "matrix of integers": ("dtypes", "fail", None, cast("layers.0.self_attn.o_proj.weight", torch.int32)),
    "biases lost": ("shapes", "fail", 5, without("e_score_correction_bias")),
    "MTP lost": ("mtp-stored", "fail", 8, lambda broken: without(*of_mtp(broken))(broken)),
    "MTP not announced": ("mtp-stored", "fail", 8, keys(num_nextn_predict_layers=0)),
    "MTP at another index": ("mtp-stored", "fail", 8, renamed(f"{MTP}.", "model.layers.61.")),
    "MTP counted as a layer": ("mtp-stored", "fail", 8, keys(num_hidden_layers=10)),
    "MTP not whole": ("mtp-stored", "fail", 8, without(f"{MTP}.shared_head.norm.weight")),
    "copies left out": ("mtp-stored", "warn", 8, without(f"{MTP}.embed_tokens.weight", "shared_head.head.weight")),
    "biases in bfloat16": ("bias-dtype", "warn", 5, cast("e_score_correction_bias", torch.bfloat16)),
    "gate in float8": ("dtypes", "fail", 4, cast("mlp.gate.weight", torch.float8_e4m3fn)),
    "two dtypes": ("dtypes", "warn", None, cast("o_proj.weight", torch.bfloat16)),
    "float16 claimed": ("dtypes", "warn", None, keys(torch_dtype="float16")),
    "float8 unannounced": ("scales", "fail", 9, cast("o_proj.weight", torch.float8_e4m3fn)),
    "scales beside plain ones": (
        "scales",
        "fail",
        9,
        renamed("layers.0.mlp.up_proj.weight", "layers.0.mlp.weight_scale_inv"),
    ),
}


def of_mtp(sound: Patient) -> tuple[str, ...]:
    return tuple(name for name in sound.tensors if name.startswith(f"{MTP}."))


def verdicts(findings: list[Finding]) -> set[tuple[str, str, int | None]]:
    return {(finding.check, finding.verdict, finding.trap) for finding in findings}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, tmp_path: Path) -> None:
    *expected, break_it = BROKEN[name]
    broken = patient()
    break_it(broken)
    found = not_passed(broken.examined(tmp_path / "model", "headers"))
    assert tuple(expected) in verdicts(found), found
    for finding in found:
        assert finding.sentence.endswith((".", "?")), finding.sentence


def test_a_layer_that_config_does_not_count_is_left_over(tmp_path: Path) -> None:
    """Without MTP there is nothing else that speaks of layers past the last."""
    short = patient(tiny(num_hidden_layers=3))
    short.raw["num_hidden_layers"] = 2
    found = not_passed(short.examined(tmp_path / "model", "headers"))
    assert [(finding.check, finding.verdict) for finding in found] == [("shapes", "fail")]
    assert "model.layers.2." in found[0].sentence and "left over" in found[0].sentence


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, "steps of 0.008"), (torch.float16, "steps of 0.001")])
def test_a_coarse_bias_is_said_once_and_in_its_own_steps(dtype: torch.dtype, steps: str, tmp_path: Path) -> None:
    broken = patient()
    cast("e_score_correction_bias", dtype)(broken)
    (found,) = not_passed(broken.examined(tmp_path / "model"))
    assert (found.check, found.verdict) == ("bias-dtype", "warn") and steps in found.sentence


def test_other_kinds_of_stretching_are_refused_without_advice_on_yarn(tmp_path: Path) -> None:
    broken = patient()
    broken.raw["rope_scaling"] = {"type": "linear", "factor": 4.0}
    found = not_passed(broken.examined(tmp_path / "model", "headers"))
    assert [finding.check for finding in found] == ["config"]


def test_the_same_unbroken(tmp_path: Path) -> None:
    """Every check that names what is broken above has looked here, and is content."""
    sound = patient()
    rope()(sound)
    findings = sound.examined(tmp_path / "model", "headers")
    assert not_passed(findings) == []
    of_broken = {check for check, *_ in BROKEN.values()} - {"format", "scales", "rotary-dims"}  # silent when sound
    assert of_broken <= {finding.check for finding in findings}


def case_of(raw: Mapping[str, Any]) -> Case:
    return Case(Path(), raw, ModelConfig.from_hf(raw), PLAIN, None, {})


def of_configuration(raw: Mapping[str, Any]) -> list[Finding]:
    return [finding for check in configuration.CHECKS for finding in check(case_of(raw))]


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_sound(name: str) -> None:
    assert not_passed(of_configuration(preset(name).to_hf())) == []


@pytest.mark.parametrize(
    ("name", "changes", "trap", "verdict"),
    [
        ("deepseek-v3", {"n_group": 1, "topk_group": 1}, 3, "fail"),
        ("deepseek-v3", {"routed_scaling_factor": 1.5}, 4, "fail"),
        ("moonlight-16b-a3b", {"routed_scaling_factor": 2.5}, 4, "fail"),
        ("deepseek-v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1}, 4, "fail"),
        ("deepseek-v2", {"routed_scaling_factor": 1.0}, 4, "fail"),
        ("kimi-k2", {"num_experts_per_tok": 6}, 4, "fail"),
        ("kimi-k2", {"rope_theta": 10000.0}, None, "warn"),
        ("deepseek-v3", {"rms_norm_eps": 1e-5}, None, "warn"),
        ("deepseek-v2-lite", {"rope_scaling": yarn(4096)}, 2, "warn"),
    ],
)
def test_a_stranger_in_the_family(name: str, changes: dict[str, Any], trap: int | None, verdict: str) -> None:
    found = [f for f in not_passed(of_configuration(preset(name).to_hf() | changes)) if f.check == "family"]
    assert (verdict, trap) in {(finding.verdict, finding.trap) for finding in found}
    assert all(name in finding.sentence and finding.value["key"] in finding.sentence for finding in found)
    assert {finding.value["key"] for finding in found} == set(changes)


@pytest.mark.parametrize(
    "changes",
    [{"scoring_func": "sigmoid"}, {"topk_method": "noaux_tc"}, {"norm_topk_prob": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_gate_that_no_v2_has(changes: dict[str, Any], tmp_path: Path) -> None:
    broken = patient(tiny(V2))
    keys(**changes)(broken)
    assert ("gate", "fail", 4) in verdicts(broken.examined(tmp_path / "model", "headers"))


def test_biases_of_a_gate_that_has_none(tmp_path: Path) -> None:
    broken = patient(tiny(V2))
    broken.tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.zeros(8)
    (found,) = not_passed(broken.examined(tmp_path / "model", "headers"))
    assert (found.check, found.verdict, found.trap) == ("shapes", "fail", 4) and "noaux_tc" in found.sentence


def test_greedy_ignores_groups() -> None:
    raw = tiny(V2).to_hf() | {"n_group": 4, "topk_group": 2}
    assert ("group-limit", "warn", 3) in verdicts(of_configuration(raw))


def in_fp8(folder: Path) -> Patient:
    """A sound fp8 checkpoint with matrices of ragged size, MTP included."""
    sound = patient(WHOLE.replace(intermediate_size=200))
    config = WHOLE.replace(intermediate_size=200)
    files = Safetensors(write_folder(folder, config, stored_as(sound.tensors, FP8, packable(config).__contains__), FP8))
    raw = json.loads((folder / "config.json").read_text())
    return Patient(raw, {name: files.tensor(name) for name in files.entries})


def rounded_down(broken: Patient) -> None:
    for name, tensor in broken.tensors.items():
        if name.endswith("_scale_inv") and len(tensor) > 1:
            broken.tensors[name] = tensor[:-1].contiguous()


def scale_of_another(broken: Patient) -> None:
    broken.tensors["model.layers.0.self_attn.o_proj.weight_scale"] = torch.ones(1, 1)


def converted(broken: Patient) -> None:
    without("_scale_inv")(broken)
    for ending in ("proj.weight", "mqa.weight"):
        cast(ending, torch.bfloat16)(broken)


FP8_BROKEN: dict[str, Break] = {
    "not announced": keys(quantization_config=None),
    "rounded down": rounded_down,
    "one missing": without("model.layers.0.self_attn.o_proj.weight_scale_inv"),
    "all missing": without("_scale_inv"),
    "a stray one": scale_of_another,
    "converted, still announced": converted,
}


@pytest.mark.parametrize("name", FP8_BROKEN)
def test_scales_that_do_not_fit(name: str, tmp_path: Path) -> None:
    broken = in_fp8(tmp_path / "source")
    FP8_BROKEN[name](broken)
    assert ("scales", "fail", 9) in verdicts(broken.examined(tmp_path / "model", "headers"))


def test_plain_matrices_among_packed_ones_want_to_be_listed(tmp_path: Path) -> None:
    """As MTP left in bfloat16 inside an fp8 checkpoint: sound if config.json says so."""
    chosen = {name for name in packable(WHOLE) if not name.startswith(MTP)}
    folder = write_folder(tmp_path / "m", WHOLE, stored_as(patient().tensors, FP8, chosen.__contains__), FP8)
    (found,) = not_passed(examine(folder, "headers"))
    assert (found.check, found.verdict, found.trap) == ("scales", "warn", 9)
    assert "modules_to_not_convert" in found.sentence
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"].append(MTP)
    (folder / "config.json").write_text(json.dumps(raw))
    assert not_passed(examine(folder, "headers")) == []


def test_packed_integers_of_ragged_groups_fit(tmp_path: Path) -> None:
    tensors = stored_as(patient().tensors, INT4, packable(WHOLE).__contains__)
    assert not_passed(examine(write_folder(tmp_path / "m", WHOLE, tensors, INT4), "headers")) == []


@pytest.mark.parametrize(("factor", "expected"), [(1.0, []), (1.005, []), (0.5, ["index"])])
def test_the_sum_in_the_index(factor: float, expected: list[str], tmp_path: Path) -> None:
    """Released ones count headers too, so a little more is nothing."""
    folder = patient(tiny()).write(tmp_path / "model", shard_bytes=2**13)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] *= factor
    (folder / INDEX).write_text(json.dumps(index))
    assert [finding.check for finding in not_passed(examine(folder, "headers"))] == expected


def test_what_can_be_read_is_examined_beside_what_cannot(tmp_path: Path) -> None:
    """Broken weights do not hide a broken gate, nor a broken config.json broken files."""
    folder = patient(tiny()).write(tmp_path / "model")
    weights, raw = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "config.json").write_text(json.dumps(raw | {"norm_topk_prob": False}))
    assert {("files", "fail", None), ("gate", "warn", 4)} <= verdicts(examine(folder))
    (folder / "config.json").write_text("{")
    assert {("files", "fail", None), ("config", "fail", None)} <= verdicts(examine(folder))
    (folder / "config.json").unlink()
    assert ("config", "fail", None) in verdicts(examine(folder))


WILD = (-3, 10**400, 1e400, "x", [[]], {"factor": "x", "type": 3}, {"quant_method": "fp8", "modules_to_not_convert": 5})


def test_a_wild_config_is_refused_without_a_crash(tmp_path: Path) -> None:
    """Every key in turn, and every one of YaRN's, holds something that it never should."""
    folder = patient(tiny()).write(tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text()) | {"rope_scaling": yarn(64), "quantization_config": {}}
    wild = [raw | {key: value} for key in raw for value in WILD]
    wild += [raw | {"rope_scaling": yarn(64) | {key: value}} for key in yarn(64).keys() - {"type"} for value in WILD]
    wild += [raw | {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": value}} for value in WILD]
    for content in wild:
        (folder / "config.json").write_text(json.dumps(content))
        case = open_case(folder)
        assert all(finding.sentence for check in (*configuration.CHECKS, *headers.CHECKS) for finding in check(case))


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file"])
def test_no_checkpoint_at_all_is_an_error(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if what == "a file":
        path.write_text("x")
    elif what == "an empty folder":
        path.mkdir()
    with pytest.raises(UserError):
        examine(path)


def test_an_unknown_level_or_engine_is_an_error(tmp_path: Path) -> None:
    folder = patient(tiny()).write(tmp_path / "model")
    with pytest.raises(UserError, match="headers, weights, model"):
        examine(folder, "everything")
    with pytest.raises(UserError, match="transformers"):
        examine(folder, "headers", against="llama.cpp")
