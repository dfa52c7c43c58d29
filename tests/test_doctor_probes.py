"""Other readings of a trained model: silent where it is read as it was trained, and right about what is wrong.

The model is trained once; then its configuration or weights are spoilt, and the reading that undoes it must be named.

Letters: T tokens, R rotary width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from cavelight.doctor.findings import Finding
from cavelight.doctor.probes import Probe, Tried, findings_of, probe, probes_of
from cavelight.doctor.variants import mean_and_z, nats, variant, windows
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Phase
from cavelight.spec.presets import preset, preset_names

from .reference.tiny import V2, tiny, yarn
from .run_models import random_model
from .trained import ROW, learner, text, trained

TEXT = text(2500, seed=99)


def learnt() -> Transformer:
    return trained(learner(num_nextn_predict_layers=1))


@cache
def of_sound() -> tuple[Finding, ...]:
    return tuple(probe(learnt(), TEXT))


def test_a_model_read_as_it_was_trained_passes() -> None:
    assert [finding.check for finding in of_sound() if finding.verdict != "pass"] == []
    assert {finding.check for finding in of_sound()} >= {
        "rope-pairing",
        "group-limit-read",
        "gate-weights",
        "routed-scale",
    }
    by_check = {finding.check: finding for finding in of_sound()}
    assert by_check["rope-pairing"].value["readings"]["rotary queries in halves"]["saved"] < -0.5
    assert by_check["routing-bias-read"].value["readings"]["routing biases of zero"]["saved"] < -0.02
    assert "costs" in by_check["rope-pairing"].sentence
    assert "makes no difference" in by_check["norm-eps"].sentence


def test_a_text_that_repeats_itself_tells_nothing() -> None:
    (found,) = probe(learnt(), TEXT[:300].repeat(8))
    assert (found.check, found.verdict) == ("probes", "pass") and "repeats itself" in found.sentence


def with_halves(model: Transformer) -> None:
    """Rotary rows stored as halves, as a converter for rotate-half engines leaves them."""
    config, attention = model.config, model.model.layers[0].self_attn
    R, H = config.qk_rope_head_dim, config.num_attention_heads
    for matrix, head in ((attention.q_b_proj.weight, config.qk_head_dim), (attention.kv_a_proj_with_mqa.weight, None)):
        heads = matrix.view(H, head, -1) if head else matrix[None]
        heads[:, -R:] = torch.cat([heads[:, -R::2], heads[:, 1 - R :: 2]], dim=1)


def with_other_biases(model: Transformer) -> None:
    gate = model.model.layers[0].mlp.gate
    gate.e_score_correction_bias.copy_(-3 * gate.e_score_correction_bias)


def with_larger_shared_experts(model: Transformer) -> None:
    model.model.layers[0].mlp.shared_experts.down_proj.weight.mul_(2.5)


def with_yarn(model: Transformer) -> None:
    """Nothing to do: the weights were trained without."""


@dataclass(frozen=True)
class Spoilt:
    """What is spoilt, and the check, trap and words that must come of it."""

    weights: Callable[[Transformer], None] | None
    config: dict[str, object]
    check: str
    trap: int | None
    words: str


YARN = tiny(rope_scaling=yarn(16)).rope_scaling
SPOILT = {
    "rotary rows in halves": Spoilt(with_halves, {}, "rope-pairing", 1, "rotary queries and keys in halves"),
    "another theta": Spoilt(None, {"rope_theta": 100.0}, "rope-theta", None, "rope_theta 10000"),
    "yarn": Spoilt(None, {"rope_scaling": YARN}, "yarn-read", 2, "rope_scaling does not belong to these weights"),
    "biases": Spoilt(with_other_biases, {}, "routing-bias-read", 5, "routing biases of zero"),
    "scaling factor": Spoilt(None, {"routed_scaling_factor": 1.25}, "routed-scale", 4, "routed_scaling_factor 2.5"),
    "shared experts": Spoilt(
        with_larger_shared_experts, {}, "shared-scale", 4, "shared experts' down_proj is off by a factor of 0.4"
    ),
    "scores": Spoilt(None, {"scoring_func": "softmax"}, "gate-scores", 4, "sigmoid scores"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_was_spoilt_is_named(name: str) -> None:
    spoilt = SPOILT[name]
    model = copy.deepcopy(learnt())
    if spoilt.weights is not None:
        spoilt.weights(model)
    findings = probe(variant(model, **spoilt.config), TEXT)
    (failed,) = [finding for finding in findings if finding.verdict == "fail"]
    assert (failed.check, failed.trap) == (spoilt.check, spoilt.trap)
    assert spoilt.words in failed.sentence
    for warning in (finding for finding in findings if finding.verdict == "warn"):
        assert "mend that first" in warning.sentence


def test_a_model_that_knows_nothing_is_not_judged() -> None:
    (found,) = probe(random_model(learner()), TEXT)
    assert found.verdict == "pass"
    assert "no better than chance" in found.sentence


def test_numbers_that_are_none_are_not_judged() -> None:
    model = copy.deepcopy(learnt())
    model.lm_head.weight[0, 0] = torch.nan
    (found,) = probe(model, TEXT[:300])
    assert (found.check, found.verdict) == ("probes", "pass")


def test_a_few_tokens_are_not_judged() -> None:
    (found,) = probe(learnt(), TEXT[:100])
    assert found.verdict == "pass"
    assert "only 100 tokens" in found.sentence


def test_progress_is_told() -> None:
    events: list[Event] = []
    probe(learnt(), TEXT[:300], events.append)
    phases = [event for event in events if isinstance(event, Phase)]
    count = len(list(probes_of(learnt().config)))
    assert [(phase.done, phase.total) for phase in phases] == [(done, count) for done in range(count + 1)]


@pytest.mark.parametrize(
    "config",
    [
        tiny(rope_scaling=yarn(16), n_group=4, topk_group=2),
        tiny(rope_scaling=yarn(16, 1.0, 0.0)),
        tiny(V2, rope_scaling=yarn(16, 0.707)),
        tiny(q_lora_rank=None, n_shared_experts=None, norm_topk_prob=False),
        tiny(first_k_dense_replace=2, rms_norm_eps=1e-4),
    ],
    ids=["v3 with yarn", "no mscale_all_dim", "v2", "little", "dense"],
)
def test_every_reading_runs_and_computes_something_else(config: ModelConfig) -> None:
    """And leaves the model that it was made from as it was."""
    model, rows = random_model(config), windows(torch.arange(64) % 48, 32, 64)
    with torch.no_grad():
        before = nats(model, rows)
        for each in probes_of(config):
            assert not torch.equal(nats(each.build(model), rows), before), each.reading
            assert torch.equal(nats(model, rows), before), each.reading


@pytest.mark.parametrize("name", preset_names())
def test_no_reading_is_the_configured_one(name: str) -> None:
    readings = [each.reading for each in probes_of(preset(name))]
    assert len(readings) == len(set(readings)) >= 9
    assert f"routed_scaling_factor {preset(name).routed_scaling_factor:g}" not in readings


def test_only_the_best_of_several_better_readings_fails() -> None:
    def tried(check: str, reading: str, saved: float, z: float) -> Tried:
        return Tried(Probe(check, 4, reading, partial(variant), "mend it"), saved, z)

    found = findings_of(
        2.0,
        [
            tried("a", "one", 0.5, 9.0),
            tried("b", "two", 0.7, 8.0),
            tried("b", "three", 0.9, 5.0),  # more, but not sure
            tried("c", "four", 0.01, 20.0),  # sure, but too little to matter
            tried("d", "five", -0.3, -20.0),
        ],
    )
    assert [(finding.check, finding.verdict) for finding in found] == [
        ("a", "warn"),
        ("b", "fail"),
        ("c", "pass"),
        ("d", "pass"),
    ]
    assert found[1].sentence == "Read with two, the text takes 1.30 nats a token instead of 2.00: mend it."
    assert "less than two saves" in found[0].sentence


def test_a_difference_is_judged_by_blocks_of_neighbours() -> None:
    """Tokens that come in equal runs carry less than as many independent ones."""
    source = torch.Generator().manual_seed(0)
    free_T = 0.1 + torch.randn(4096, generator=source)
    runs_T = (0.1 + torch.randn(256, generator=source)).repeat_interleave(16)
    assert mean_and_z(free_T)[1] == pytest.approx(0.1 * 64, abs=3)
    assert abs(mean_and_z(runs_T)[1] - float(runs_T.mean()) * 16) < 0.2 * 16
    assert mean_and_z(torch.zeros(64)) == (0.0, 0.0)


def test_windows_take_what_is_there() -> None:
    rows = windows(list(range(2 * ROW + 10)), ROW, 1000)
    assert [tuple(row.shape) for row in rows] == [(2, ROW), (1, 10)]
    assert torch.cat([row.flatten() for row in rows]).tolist() == list(range(2 * ROW + 10))
    assert [tuple(row.shape) for row in windows(range(2 * ROW + 7), ROW, 1000)] == [(2, ROW)]
    assert [tuple(row.shape) for row in windows(range(100), ROW, 20)] == [(1, 20)]
