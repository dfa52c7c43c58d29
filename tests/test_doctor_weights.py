"""The doctor on weights that were broken on purpose, one trap at a time."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.doctor import statistics
from cavelight.doctor.examine import examine
from cavelight.doctor.routing import unreachable
from cavelight.doctor.statistics import summarise
from cavelight.spec.events import Phase
from cavelight.spec.formats import FP8
from cavelight.weights.files import Safetensors
from cavelight.weights.stored import Checkpoint

from .packing import write_packed
from .patients import Break, Patient, in_halves, not_passed, patient
from .reference.tiny import tiny

LAST = 8  # WHOLE's last layer of the trunk, with experts
MTP = 9
BIAS = f"model.layers.{LAST}.mlp.gate.e_score_correction_bias"
GATE = f"model.layers.{LAST}.mlp.gate.weight"


def every(ending: str, change: Callable[[Tensor], object]) -> Break:
    """Change all tensors whose name ends so: one, if it is a whole name."""

    def break_it(broken: Patient) -> None:
        changed = [change(tensor) for name, tensor in broken.tensors.items() if name.endswith(ending)]
        assert changed

    return break_it


def same(name: str, other: str) -> Break:
    def break_it(broken: Patient) -> None:
        broken.tensors[name].copy_(broken.tensors[other])

    return break_it


def head_lost(broken: Patient) -> None:
    for name in ("lm_head.weight", f"model.layers.{MTP}.shared_head.head.weight"):
        broken.tensors[name].copy_(broken.tensors["model.embed_tokens.weight"])


def swap_halves(tensor: Tensor) -> None:
    tensor.copy_(tensor.roll(tensor.shape[1] // 2, 1))


def new_module(broken: Patient, norms_too: bool) -> None:
    """An MTP module as initialisation leaves it, in a trunk whose rows are trained."""
    generator = torch.Generator().manual_seed(9)
    for name, tensor in broken.tensors.items():
        if name.startswith(f"model.layers.{MTP}.") and "embed" not in name and "head.head" not in name:
            if tensor.ndim == 2:
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
            elif norms_too and "norm" in name:
                tensor.fill_(1.0)


EXPERT = f"model.layers.{LAST}.mlp.experts"
BROKEN: dict[str, tuple[str, str, int | None, Break]] = {
    "NaN": ("finite", "fail", None, every(f"{EXPERT}.3.up_proj.weight", lambda t: t[2].fill_(math.nan))),
    "infinity": ("finite", "fail", None, every("model.norm.weight", lambda t: t[3].fill_(-math.inf))),
    "fp8 codes without scales": ("loudness", "fail", 9, every("o_proj.weight", lambda t: t.mul_(2000))),
    "divided by scales": ("loudness", "fail", 9, every("down_proj.weight", lambda t: t.mul_(1e-7))),
    "matrix of zeros": ("alive", "fail", None, every(f"{EXPERT}.0.down_proj.weight", Tensor.zero_)),
    "matrix of ones": ("alive", "fail", None, every("model.layers.2.mlp.up_proj.weight", lambda t: t.fill_(1.0))),
    "dead expert": ("dead-experts", "warn", None, every(f"{EXPERT}.5.gate_proj.weight", lambda t: t.mul_(1e-4))),
    "expert written twice": (
        "twins",
        "fail",
        None,
        same(f"{EXPERT}.1.up_proj.weight", f"{EXPERT}.2.up_proj.weight"),
    ),
    "layer written twice": (
        "twins",
        "fail",
        None,
        same("model.layers.1.self_attn.o_proj.weight", "model.layers.4.self_attn.o_proj.weight"),
    ),
    "MTP begun as a layer": (
        "twins",
        "warn",
        6,
        same(f"model.layers.{MTP}.self_attn.o_proj.weight", f"model.layers.{LAST}.self_attn.o_proj.weight"),
    ),
    "head lost": (
        "twins",
        "warn",
        None,
        head_lost,
    ),
    "norm of zeros": ("norms", "fail", None, every("model.layers.3.input_layernorm.weight", Tensor.zero_)),
    "norms as differences": ("norms", "warn", None, every("kv_a_layernorm.weight", lambda t: t.sub_(2.0))),
    "norm with a spike": ("norms", "warn", None, every("model.norm.weight", lambda t: t[7].fill_(-250.0))),
    "norms made anew": ("norms", "warn", None, every("kv_a_layernorm.weight", lambda t: t.fill_(1.0))),
    "negative bias": ("routing-bias", "warn", 3, every(BIAS, lambda t: t.sub_(1.0))),
    "bias lost": ("routing-bias", "warn", 5, every("e_score_correction_bias", Tensor.zero_)),
    "bias through bfloat16": ("routing-bias", "warn", 5, every(BIAS, lambda t: t.copy_(t.bfloat16()))),
    "bias ran away": ("reach", "warn", 5, every(BIAS, lambda t: t[0].fill_(-2.0))),
    "gate row of zeros": ("gate-rows", "fail", None, every(GATE, lambda t: t[6].zero_())),
    "gate row twice": ("gate-rows", "warn", None, every(GATE, lambda t: t[6].copy_(t[1]))),
    "MTP's head differs": (
        "mtp-copies",
        "fail",
        8,
        every(f"model.layers.{MTP}.shared_head.head.weight", lambda t: t[0, 0].add_(0.5)),
    ),
    "MTP never trained": ("mtp-untrained", "fail", 6, lambda patient: new_module(patient, norms_too=True)),
    "MTP hardly trained": ("mtp-untrained", "warn", 6, lambda patient: new_module(patient, norms_too=False)),
    "the report's order": ("mtp-halves", "fail", 6, every(f"model.layers.{MTP}.eh_proj.weight", swap_halves)),
    "rotary rows in halves": (
        "rope-pairs",
        "fail",
        1,
        lambda patient: in_halves(patient, "mqa.weight", "q_b_proj.weight"),
    ),
    "queries in halves": ("rope-pairs", "fail", 1, lambda patient: in_halves(patient, "q_b_proj.weight")),
    "keys in halves": ("rope-pairs", "fail", 1, lambda patient: in_halves(patient, "with_mqa.weight")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, tmp_path: Path) -> None:
    check, verdict, trap, break_it = BROKEN[name]
    broken = patient()
    break_it(broken)
    found = {finding.check: finding for finding in not_passed(broken.examined(tmp_path / "model"))}
    assert check in found, found
    assert (found[check].verdict, found[check].trap) == (verdict, trap), found[check].sentence


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (BIAS, (7,)),
        (GATE, (8, 3)),
        (f"model.layers.{MTP}.eh_proj.weight", (64, 64)),
        (f"model.layers.{MTP}.enorm.weight", (5,)),
        ("model.layers.2.self_attn.q_b_proj.weight", (7, 5)),
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", (3, 64)),
        ("model.embed_tokens.weight", (5, 64)),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", (64, 1)),
    ],
)
def test_tensors_that_do_not_fit_are_survived_and_the_others_examined(
    name: str, shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    broken = patient()
    del broken.tensors[name]
    if shape:
        broken.tensors[name] = torch.rand(shape)
    broken.tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.nan
    failed = {finding.check for finding in broken.examined(tmp_path / "model") if finding.verdict == "fail"}
    assert "finite" in failed and failed & {"shapes", "mtp-stored"}


def test_the_same_unbroken(tmp_path: Path) -> None:
    """Every check that names what is broken above has looked here, and is content."""
    findings = patient().examined(tmp_path / "model")
    assert not_passed(findings) == []
    checks = {finding.check for finding in findings}
    assert {check for check, *_ in BROKEN.values()} - checks == {"dead-experts", "reach"}  # spoken of under others


def test_what_the_weights_do_show(tmp_path: Path) -> None:
    sentences = {finding.check: finding.sentence for finding in patient().examined(tmp_path / "model")}
    assert "are paired as neighbours" in sentences["rope-pairs"] and "queries and keys" in sentences["rope-pairs"]
    assert "reads [embedding ; hidden]" in sentences["mtp-halves"]


def test_nothing_is_claimed_where_nothing_shows(tmp_path: Path) -> None:
    """Norms that are all one, rows of any size: no verdict on order, pairing or training."""
    fresh, generator = patient(), torch.Generator().manual_seed(1)
    for name, tensor in fresh.tensors.items():
        if "norm" in name:
            tensor.fill_(1.0)
        elif name.endswith("proj.weight") or name.endswith("mqa.weight"):
            tensor.normal_(std=0.02, generator=generator)
    findings = fresh.examined(tmp_path / "model")
    assert not_passed(findings) == []
    sentences = {finding.check: finding.sentence for finding in findings}
    assert "do not show" in sentences["rope-pairs"]
    assert "mtp-halves" not in sentences and "mtp-untrained" not in sentences


def in_fp8(folder: Path) -> Patient:
    """A sound checkpoint in block-fp8, as read back from its files."""
    config = tiny()
    files = Safetensors(write_packed(folder, config, patient(config).tensors, FP8))
    raw = json.loads((folder / "config.json").read_text())
    return Patient(raw, {name: files.tensor(name) for name in files.entries})


@pytest.mark.parametrize("turned", [False, True], ids=["as they are", "inverted"])
def test_scales_that_look_inverted(turned: bool, tmp_path: Path) -> None:
    stored = in_fp8(tmp_path / "source")
    for name, tensor in stored.tensors.items():
        if turned and name.endswith("_scale_inv"):
            tensor.reciprocal_()
    found = {f.check: (f.verdict, f.trap) for f in not_passed(stored.examined(tmp_path / "model"))}
    assert found == ({"scale-values": ("fail", 9)} if turned else {})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_none(value: float, tmp_path: Path) -> None:
    stored = in_fp8(tmp_path / "source")
    stored.tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"].fill_(value)
    found = {f.check: f for f in not_passed(stored.examined(tmp_path / "model"))}
    assert found["readable"].verdict == "fail" and "finite and positive" in found["readable"].sentence


def test_fp8_values_that_are_nan_are_counted(tmp_path: Path) -> None:
    stored = in_fp8(tmp_path / "source")
    stored.tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8)[3, 4] = 0x7F
    (found,) = not_passed(stored.examined(tmp_path / "model"))
    assert (found.check, found.value) == ("finite", {"tensors": {"model.layers.1.self_attn.o_proj.weight": 1}})


def test_progress_is_told_in_bytes_and_ends(tmp_path: Path) -> None:
    folder = patient(tiny()).write(tmp_path / "model")
    phases: list[Phase] = []
    examine(folder, on_event=lambda event: phases.append(event) if isinstance(event, Phase) else None)
    size = sum(entry.nbytes for entry in Safetensors(folder).entries.values())
    assert [phase.done for phase in phases] == sorted(phase.done for phase in phases)
    assert {(phase.total, phase.unit) for phase in phases} == {(size, "B")} and phases[-1].done == size


def test_blocks_and_wholes_give_the_same_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of more rows than a block has: nothing is counted twice or left out between blocks."""
    sick = patient(tiny(vocab_size=300))
    sick.tensors["model.embed_tokens.weight"][290, 3] = math.nan
    checkpoint = Checkpoint(sick.write(tmp_path / "model"))
    whole = summarise("model.embed_tokens.weight", checkpoint)
    monkeypatch.setattr(statistics, "BLOCK_BYTES", 1)
    parts = summarise("model.embed_tokens.weight", checkpoint)
    assert len(list(checkpoint.blocks("model.embed_tokens.weight", 1))) == 3
    values = sick.tensors["model.embed_tokens.weight"].double()
    finite = values[values.isfinite()]
    for summary in (whole, parts):
        assert (summary.bad, summary.least, summary.most) == (1, float(finite.min()), float(finite.max()))
        assert summary.moments == pytest.approx([float((finite**n).sum()) for n in (1, 2)], rel=1e-6)
        assert summary.rms == pytest.approx(float(finite.square().mean().sqrt()), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_expert_is_called_unreachable_that_some_scores_reach(data: st.DataObject) -> None:
    """Random biases; the router itself, on scores made in each expert's favour, finds every expert that it can."""
    E, groups, kept, K = data.draw(st.sampled_from([(8, 1, 1, 2), (8, 4, 2, 2), (8, 2, 1, 3), (12, 3, 2, 4)]))
    config = tiny(n_routed_experts=E, n_group=groups, topk_group=kept, num_experts_per_tok=K)
    bias_E = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=32), min_size=E, max_size=E)))
    named = set(unreachable(bias_E, config))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for expert in range(E):
        scores_TE = torch.rand(200, E, generator=generator).pow(3)
        scores_TE[:, expert] = 1.0
        scores_TE[:100, :] *= 1e-6
        scores_TE[:100, expert] = 1.0
        own = expert // (E // groups)
        scores_TE[50:100].view(-1, groups, E // groups)[:, own] = 1.0
        chosen = choose(scores_TE.double(), bias_E.double(), groups, kept, K)
        assert not (named & set(chosen.flatten().tolist()))


def choose(scores_TE: Tensor, bias_E: Tensor, groups: int, kept: int, K: int) -> Tensor:
    """V3's choice of experts [T, K], written plainly."""
    choice_TGM = (scores_TE + bias_E).unflatten(1, (groups, -1))
    best_TG = choice_TGM.topk(2, dim=-1).values.sum(-1)
    out_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, best_TG.topk(kept, dim=1).indices, False)
    return choice_TGM.masked_fill(out_TG[..., None], -math.inf).flatten(1).topk(K, dim=1).indices


def test_unreachable_experts_are_found_with_and_without_groups() -> None:
    bias_E = torch.tensor([0.0, 0.0, 1.2, 1.3, 0.5, 0.6, 1.1, 0.9])
    assert unreachable(bias_E, tiny()) == [0, 1]  # two of 1.2, 1.3 and 1.1 are always ahead
    assert unreachable(bias_E, tiny(n_group=2, topk_group=1)) == [0, 1]
    # Four groups of two, two kept: the first group's best case is 2.0, which two others have in any case.
    assert unreachable(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.9]), tiny(n_group=4, topk_group=2)) == [0, 1]
    assert unreachable(bias_E / 2, tiny(n_group=2, topk_group=1)) == []


def test_negative_biases_are_no_matter_without_a_group_limit(tmp_path: Path) -> None:
    for n_group, expected in ((1, []), (2, ["routing-bias"])):
        sick = patient(tiny(n_group=n_group))
        sick.tensors["model.layers.1.mlp.gate.e_score_correction_bias"] -= 1.0
        found = not_passed(sick.examined(tmp_path / f"model{n_group}"))
        assert [finding.check for finding in found] == expected
