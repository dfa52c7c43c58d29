"""The doctor beside transformers: silent where both compute the same, and right about where and why they do not.

Letters: T tokens, D hidden size, E experts, K experts a token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs_v3

from cavelight.doctor import witness
from cavelight.doctor.against import against_transformers, spread
from cavelight.doctor.findings import Finding
from cavelight.doctor.witness import Witness, open_transformers
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Phase
from cavelight.weights.snapshot import write_checkpoint

from .reference.ours import our_model
from .reference.random_weights import random_weights
from .reference.tiny import V2, some_tokens, tiny, yarn

GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
FULL = tiny(rope_scaling=yarn(64, 0.707), num_nextn_predict_layers=2, num_hidden_layers=3, **GROUPS)
SOUND = {
    "everything": FULL,
    "plain": tiny(),
    "no query compression, eps 1e-5": tiny(q_lora_rank=None, rms_norm_eps=1e-5, rope_theta=50000.0),
    "not normalised": tiny(norm_topk_prob=False, num_nextn_predict_layers=1),
    "no shared experts": tiny(n_shared_experts=None),
    "no experts": tiny(first_k_dense_replace=2),
    "odd sizes": tiny(num_attention_heads=3, hidden_size=48, v_head_dim=12, kv_lora_rank=20),
    "yarn, mscales apart": tiny(rope_scaling=yarn(64, 1.0, 0.5), qk_rope_head_dim=16),
    "a short context": tiny(max_position_embeddings=40),
    "v2 greedy with yarn": tiny(V2, rope_scaling=yarn(16, 0.707)),
    "v2 group limited": tiny(V2 | GROUPS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], Path]:
    """Checkpoints of random weights; their routing biases are mostly negative, which some masks do not survive."""

    @cache
    def written(config: ModelConfig) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / "model"
        weights = random_weights(config, seed=1)
        lowered = {name: tensor - 1.0 for name, tensor in weights.items() if name.endswith("correction_bias")}
        write_checkpoint(our_model(config, weights | lowered), folder, shift_biases=False)
        return folder

    return written


Folders = Callable[[ModelConfig], Path]


@pytest.mark.parametrize("name", SOUND)
def test_says_nothing_against_a_sound_checkpoint(name: str, folders: Folders) -> None:
    config = SOUND[name]
    (found,) = against_transformers(folders(config), some_tokens(config, 200))
    assert (found.check, found.verdict) == ("against-transformers", "pass")
    assert found.value["relative"] < 3e-6  # far from what would be taken for a difference


@dataclass(frozen=True)
class Mistake:
    """What to break in transformers, and what is to be said: place, part, trap, words."""

    break_it: Callable[[nn.Module], None]
    place: str
    part: str
    trap: int | None
    words: str
    config: ModelConfig = FULL


def on_layer(number: int, name: str, change: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    return lambda model: change(model.get_submodule(f"model.layers.{number}.{name}".rstrip(".")))


def set_attribute(name: str, value: Callable[[object], object]) -> Callable[[nn.Module], None]:
    return lambda part: setattr(part, name, value(getattr(part, name)))


def scaled_output(factor: float) -> Callable[[nn.Module], None]:
    return lambda part: part.register_forward_hook(lambda _, __, out: out * factor) and None


def gate(rule: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[nn.Module], None]:
    """A gate whose weights [T, K] and ids are `rule(gate, scores, biased scores)`."""

    def change(part: nn.Module) -> None:
        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = nn.functional.linear(hidden.view(-1, hidden.shape[-1]), part.weight)
            scores = logits.sigmoid()
            return logits, *rule(part, scores, scores + part.e_score_correction_bias)

        part.forward = forward

    return change


def weighted(part: nn.Module, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    chosen = scores.gather(1, ids)
    return chosen / chosen.sum(-1, keepdim=True) * part.routed_scaling_factor, ids


def kept_groups(part: nn.Module, group_scores: Tensor, choice: Tensor, masked: float) -> Tensor:
    kept = torch.zeros_like(group_scores).scatter(1, group_scores.topk(part.topk_group).indices, 1.0)
    return choice.masked_fill(kept.repeat_interleave(choice.shape[1] // part.num_group, 1) == 0, masked)


def in_groups(choice: Tensor) -> Tensor:
    return choice.unflatten(1, (GROUPS["n_group"], -1))


def masked_with_zero(part: nn.Module, scores: Tensor, biased: Tensor) -> tuple[Tensor, Tensor]:
    best_two = in_groups(biased).topk(2).values.sum(-1)
    return weighted(part, scores, kept_groups(part, best_two, biased, 0.0).topk(3).indices)


def by_best_expert(part: nn.Module, scores: Tensor, biased: Tensor) -> tuple[Tensor, Tensor]:
    choice = kept_groups(part, in_groups(biased).amax(-1), biased, -torch.inf)
    return weighted(part, scores, choice.topk(3).indices)


def of_right_choice(weigh: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """A gate that chooses rightly, and weighs by `weigh(chosen scores, chosen biased scores)`."""

    def rule(part: nn.Module, scores: Tensor, biased: Tensor) -> tuple[Tensor, Tensor]:
        best_two = in_groups(biased).topk(2).values.sum(-1)
        ids = kept_groups(part, best_two, biased, -torch.inf).topk(3).indices
        return weigh(scores.gather(1, ids), biased.gather(1, ids)), ids

    return gate(rule)


def angles(change: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    return lambda model: change(model.get_submodule("model.rotary_emb"))


def without_yarn(rotary: nn.Module) -> None:
    rotary.inv_freq.copy_(10000.0 ** -(torch.arange(0, 8, 2) / 8))


PLAIN_SCALE = FULL.qk_head_dim**-0.5
MISTAKES = {
    "another embedding": Mistake(
        lambda model: model.get_submodule("model.embed_tokens").weight.data.mul_(1.01),
        "the model", "embedding", None, "weights are not the same",
    ),
    "frequencies without yarn": Mistake(angles(without_yarn), "the model", "rotary angles", 2, "without YaRN"),
    "all frequencies divided": Mistake(
        angles(lambda rotary: rotary.inv_freq.copy_(10000.0 ** -(torch.arange(0, 8, 2) / 8) / 40)),
        "the model", "rotary angles", 2, "not the slow ones alone",
    ),
    "cos and sin with m": Mistake(
        angles(set_attribute("attention_scaling", lambda factor: 1.2608)),
        "the model", "rotary angles", 2, "1.261 long instead of 1,",
    ),
    "another theta": Mistake(
        angles(lambda rotary: rotary.inv_freq.copy_(50000.0 ** -(torch.arange(0, 8, 2) / 8))),
        "the model", "rotary angles", None, "rope_theta is about 50000", tiny(),
    ),
    "eps of a norm": Mistake(
        on_layer(1, "input_layernorm", set_attribute("variance_epsilon", lambda eps: 1e-2)),
        "layer 1", "input norm", None, "eps is about 0.01, ours 1e-06",
    ),
    "eps of the latent's norm": Mistake(
        on_layer(0, "self_attn.kv_a_layernorm", set_attribute("variance_epsilon", lambda eps: 1e-3)),
        "layer 0", "latent", None, "eps is about 0.001, ours 1e-06: the norms of the latents",
    ),
    "a norm of one plus weight": Mistake(
        on_layer(1, "post_attention_layernorm", lambda norm: norm.weight.data.add_(1)),
        "layer 1", "post-attention norm", None, "weight of the post-attention norm",
    ),
    "another q_b_proj": Mistake(
        on_layer(2, "self_attn.q_b_proj", scaled_output(1.001)), "layer 2", "queries", None, "query projection"
    ),
    "mscale left out": Mistake(
        on_layer(1, "self_attn", set_attribute("scaling", lambda scale: PLAIN_SCALE)),
        "layer 1", "attention scores", 2, "scores are 0.6291 times ours: the factor m(mscale_all_dim)^2 is left out",
    ),
    "mscale twice": Mistake(
        on_layer(0, "self_attn", set_attribute("scaling", lambda scale: scale * scale / PLAIN_SCALE)),
        "layer 0", "attention scores", 2, "taken twice",
    ),
    "mscale not squared": Mistake(
        on_layer(0, "self_attn", set_attribute("scaling", lambda scale: (scale * PLAIN_SCALE) ** 0.5)),
        "layer 0", "attention scores", 2, "once instead of squared",
    ),
    "scale of a cache row": Mistake(
        on_layer(0, "self_attn", set_attribute("scaling", lambda scale: FULL.cache_width**-0.5)),
        "layer 0", "attention scores", 2, "width of a cache row", tiny(),
    ),
    "another o_proj": Mistake(
        on_layer(0, "self_attn.o_proj", scaled_output(1.01)), "layer 0", "attention", None, "o_proj"
    ),
    "gate in bfloat16": Mistake(
        on_layer(1, "mlp.gate", lambda part: part.weight.data.copy_(part.weight.bfloat16())),
        "layer 1", "gate scores", 5, "lower precision",
    ),
    "no bias": Mistake(
        on_layer(2, "mlp.gate", lambda part: part.e_score_correction_bias.zero_()),
        "layer 2", "chosen experts", 5, "bias is left out",
    ),
    "no limit to groups": Mistake(
        on_layer(1, "mlp.gate", gate(lambda part, scores, biased: weighted(part, scores, biased.topk(3).indices))),
        "layer 1", "chosen experts", 3, "not limited to groups",
    ),
    "masked with zero": Mistake(
        on_layer(1, "mlp.gate", gate(masked_with_zero)), "layer 1", "chosen experts", 3, "masked with 0 instead of -inf"
    ),
    "groups by their best": Mistake(
        on_layer(1, "mlp.gate", gate(by_best_expert)), "layer 1", "chosen experts", 3, "scored by their best expert",
        tiny(n_routed_experts=16, **GROUPS),
    ),
    "not scaled": Mistake(
        on_layer(1, "mlp.gate", set_attribute("routed_scaling_factor", lambda factor: 1.0)),
        "layer 1", "gate weights", 4, "0.4 times ours: routed_scaling_factor is left out",
    ),
    "scaled twice": Mistake(
        on_layer(1, "mlp.gate", set_attribute("routed_scaling_factor", lambda factor: factor**2)),
        "layer 1", "gate weights", 4, "2.5 times ours: routed_scaling_factor is taken twice",
    ),
    "not normalised": Mistake(
        on_layer(1, "mlp.gate", set_attribute("norm_topk_prob", lambda norm: False)),
        "layer 1", "gate weights", 4, "weights are not normalised",
    ),
    "biased weights": Mistake(
        on_layer(1, "mlp.gate", of_right_choice(lambda scores, biased: biased / biased.sum(-1, keepdim=True) * 2.5)),
        "layer 1", "gate weights", 4, "weights come from the biased scores",
    ),
    "scaled behind the gate": Mistake(
        on_layer(2, "mlp.experts", scaled_output(2.5)), "layer 2", "routed experts", 4, "are 2.5 times ours"
    ),
    "scaled shared experts": Mistake(
        on_layer(1, "mlp.shared_experts", scaled_output(0.4)), "layer 1", "shared experts", 4, "0.4 times ours"
    ),
    "the sum scaled": Mistake(
        on_layer(1, "mlp", scaled_output(2.5)),
        "layer 1", "feed-forward", 4, "2.5 times the routed experts and 2.5 times the shared ones",
    ),
    "a dense feed-forward": Mistake(
        on_layer(0, "mlp.gate_proj", scaled_output(1.1)), "layer 0", "feed-forward", None, "activation"
    ),
    "the residual": Mistake(on_layer(0, "", scaled_output(1.01)), "layer 0", "layer output", None, "residual"),
    "the final norm": Mistake(
        lambda model: setattr(model.get_submodule("model.norm"), "variance_epsilon", 0.1),
        "the model", "final norm", None, "eps is about 0.1",
    ),
    "a tied head": Mistake(
        lambda model: model.lm_head.weight.data.copy_(model.get_submodule("model.embed_tokens").weight),
        "the model", "logits", None, "weights are not the same",
    ),
}  # fmt: skip


def find(folder: Path, config: ModelConfig, break_it: Callable[[nn.Module], None]) -> Finding:
    def broken(folder: Path, config: ModelConfig) -> Witness:
        opened = open_transformers(folder, config)
        with torch.no_grad():
            break_it(opened.model)
        return opened

    findings = against_transformers(folder, some_tokens(config, 128), open_theirs=broken)
    return next(finding for finding in findings if finding.check == "against-transformers")


@pytest.mark.parametrize("name", MISTAKES)
def test_names_the_first_part_that_differs(name: str, folders: Folders) -> None:
    mistake = MISTAKES[name]
    found = find(folders(mistake.config), mistake.config, mistake.break_it)
    assert (found.verdict, found.value["place"], found.value["part"]) == ("fail", mistake.place, mistake.part)
    assert found.trap == mistake.trap
    assert mistake.words in found.sentence


def halves_rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned: tuple[Tensor, Tensor] = theirs_v3.apply_rotary_pos_emb(q, k, cos, sin)
    return turned


def queries_alone(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return INTERLEAVED(q, k, cos, sin)[0], halves_rotated(q, k, cos, sin)[1]


INTERLEAVED = theirs_v3.apply_rotary_pos_emb_interleave
ROTATIONS = {
    "halves": (halves_rotated, "rotary queries", 1, "rotates halves"),
    "not at all": (lambda q, k, cos, sin: (q, k), "rotary queries", 1, "does not rotate"),
    "backwards": (lambda q, k, cos, sin: INTERLEAVED(q, k, cos, -sin), "rotary queries", 1, "the other way round"),
    "the key in halves": (queries_alone, "rotary key", 1, "rotates halves"),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_names_a_wrong_rotation(name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, part, trap, words = ROTATIONS[name]
    monkeypatch.setattr(theirs_v3, "apply_rotary_pos_emb_interleave", rotation)
    found = find(folders(FULL), FULL, lambda model: None)
    assert (found.value["place"], found.value["part"], found.trap) == ("layer 0", part, trap)
    assert words in found.sentence
    assert [other["place"] for other in found.value["others"]] == ["layer 1", "layer 2", "MTP module 1", "MTP module 2"]


def break_predictors(change: Callable[[nn.Module], None]) -> Callable[[Path, ModelConfig], Witness]:
    def broken(folder: Path, config: ModelConfig) -> Witness:
        opened = open_transformers(folder, config)
        with torch.no_grad():
            change(opened.predictors)
        return opened

    return broken


@pytest.mark.parametrize(
    ("change", "place", "part", "trap"),
    [
        (
            lambda p: setattr(p.layers[1].config, "mtp_hidden_states_first", True),
            "MTP module 1", "projection", 6,
        ),
        (lambda p: p.layers[1].hnorm.weight.mul_(2), "MTP module 2", "norm of the hidden state", None),
        (lambda p: setattr(p.layers[0].mtp_block.self_attn, "scaling", 0.1), "MTP module 1", "attention scores", 2),
        (lambda p: p.layers[1].post_norm.weight.mul_(2), "MTP module 2", "final norm", None),
    ],
    ids=["order", "norm", "scale", "head norm"],
)  # fmt: skip
def test_names_what_differs_in_a_prediction_module(
    change: Callable[[nn.Module], None], place: str, part: str, trap: int | None, folders: Folders
) -> None:
    (found,) = against_transformers(folders(FULL), open_theirs=break_predictors(change))
    assert (found.verdict, found.value["place"], found.value["part"], found.trap) == ("fail", place, part, trap)


def test_says_what_transformers_fills_at_random_and_what_it_leaves(folders: Folders) -> None:
    def careless(folder: Path, config: ModelConfig) -> Witness:
        opened = open_transformers(folder, config)
        return replace(opened, missing=("model.norm.weight",), unread=("model.extra.weight", "model.layers.3.x"))

    findings = against_transformers(folders(FULL), open_theirs=careless)
    assert [(f.check, f.verdict) for f in findings[:2]] == [("against-loading", "fail"), ("against-loading", "warn")]
    assert "model.norm.weight" in findings[0].sentence
    assert "model.extra.weight" in findings[1].sentence


def test_warns_that_transformers_feeds_mtp_after_the_norm(folders: Folders) -> None:
    agree, warning = against_transformers(folders(tiny(num_nextn_predict_layers=1, mtp_hidden="pre_norm")))
    assert (agree.verdict, warning.verdict, warning.trap) == ("pass", "warn", 6)


def test_positions_reach_the_far_end() -> None:
    assert spread(6, tiny(max_position_embeddings=163840)).tolist() == [0, 1, 2, 16381, 16382, 16383]
    assert spread(5, tiny(max_position_embeddings=5)).tolist() == [0, 1, 2, 3, 4]


def test_says_how_to_get_transformers(monkeypatch: pytest.MonkeyPatch, folders: Folders) -> None:
    monkeypatch.setattr(witness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"transformers is not installed.*pip install"):
        against_transformers(folders(tiny()))
    monkeypatch.undo()
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(UserError, match=r"too old.*4\.57\.1"):
        against_transformers(folders(tiny()))


def test_progress_is_told(folders: Folders) -> None:
    events: list[Event] = []
    against_transformers(folders(FULL), on_event=events.append)
    told = [(event.name, event.done, event.total) for event in events if isinstance(event, Phase)]
    opening = [("opening in transformers", done, 1) for done in (0, 1)]
    assert told == opening + [("comparing", done, 5) for done in range(6)]


def test_what_transformers_refuses_is_said(folders: Folders) -> None:
    with pytest.raises(UserError, match=r"transformers cannot open .*not a multiple of the number of attention heads"):
        against_transformers(folders(tiny(V2, num_attention_heads=3)))


def test_prediction_modules_that_transformers_cannot_read_are_not_compared(folders: Folders) -> None:
    agree, warning = against_transformers(folders(tiny(V2, num_nextn_predict_layers=1)))
    assert (agree.verdict, warning.check, warning.verdict) == ("pass", "against-mtp", "warn")
    assert "reads no MTP modules of deepseek_v2" in warning.sentence


def test_a_model_that_does_not_fit_twice_is_not_opened(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cavelight.memory.machine_memory", lambda: 10_000)
    with pytest.raises(UserError, match="Memory is too small"):
        against_transformers(folders(tiny()))
