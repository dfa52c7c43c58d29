"""Other readings of a checkpoint, tried on a text: where one predicts it better, the configuration is wrong.

A wrong gate, scale or pairing raises no error, and a checkpoint does not say what it was trained with. Its weights do:
they predict text best when they are used as they were trained. Each probe is one mistake that implementations made,
put into a copy of the model by configuration or hooks.

Letters: T tokens, H heads, N width without position, R rotary width, E experts, K experts a token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.doctor.variants import mean_and_z, nats, repeats_itself, variant, windows
from cavelight.model.layers import RMSNorm, yarn_mscale
from cavelight.model.mla import MLA
from cavelight.model.moe import MoE
from cavelight.model.router import Router, Routing, gate_weights
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig, Yarn
from cavelight.spec.events import Event, Phase

MOST_TOKENS, WINDOW, FEWEST_TOKENS = 4096, 1024, 256
Part = TypeVar("Part", bound=nn.Module)
CLEAR = 6.0  # standard errors; with some thirty readings tried, luck does not reach it
NOTICEABLE = 0.02  # nats a token
LEARNT = 0.5  # nats a token below ln V that some reading must reach for the text to tell anything
V3_YARN = Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)


@dataclass(frozen=True)
class Probe:
    """One other reading. `check` and `trap` as in Finding; `build` makes the copy that reads so; `do` mends it."""

    check: str
    trap: int | None
    reading: str
    build: Callable[[Transformer], Transformer]
    do: str


@dataclass(frozen=True)
class Tried:
    """A probe's outcome: what it saves against the configured reading in nats a token, and in standard errors."""

    probe: Probe
    saved: float
    z: float

    @property
    def is_better(self) -> bool:
        return self.saved > NOTICEABLE and self.z > CLEAR

    def rank(self) -> tuple[bool, float]:
        """Those that are surely better first, then by what they save."""
        return self.is_better, self.saved


def probe(
    model: Transformer,
    tokens_T: Sequence[int] | Tensor,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Finding]:
    """Predict a text as configured and in every other reading; one finding a check.

    tokens_T: of real text, some thousands if there are so many (4,096 are used at most). Fails the check whose reading
    saves most, if that is sure and more than 0.02 nats a token; others that save something are warnings, since one
    mistake may partly make up for another. A model that predicts no better than chance in any reading is not tested,
    and neither is one on a text that repeats itself.
    """
    V, config = model.config.vocab_size, model.config
    rows = windows(tokens_T, min(WINDOW, config.max_position_embeddings), MOST_TOKENS)
    if sum(map(torch.numel, rows)) < FEWEST_TOKENS:
        return [passed("probes", f"Other readings were not tested: the text has only {len(tokens_T)} tokens.")]
    if repeats_itself(torch.as_tensor(tokens_T)[:MOST_TOKENS]):
        return [passed("probes", "Other readings were not tested: the text repeats itself; give a longer one.")]
    probes = list(probes_of(config))
    configured_T = nats(model, rows)
    loss, tried = float(configured_T.mean()), []
    for done, each in enumerate(probes):
        on_event(Phase("other readings", done, len(probes), "readings"))
        tried.append(Tried(each, *mean_and_z(configured_T - nats(each.build(model), rows))))
    on_event(Phase("other readings", len(probes), len(probes), "readings"))
    if not loss - max(0.0, *(one.saved for one in tried)) <= math.log(V) - LEARNT:  # NaN too
        said = f"the model predicts the text no better than chance ({loss:.2f} nats a token, ln V is {math.log(V):.2f})"
        return [passed("probes", f"Other readings were not tested: {said}.", nats=loss)]
    return findings_of(loss, tried)


def findings_of(loss: float, tried: Sequence[Tried]) -> list[Finding]:
    """One finding a check, in the order in which they were tried; `loss` is that of the configured reading."""
    foremost, found = max(tried, key=Tried.rank), []
    for check in dict.fromkeys(one.probe.check for one in tried):
        mine = [one for one in tried if one.probe.check == check]
        best = max(mine, key=Tried.rank)
        numbers = {one.probe.reading: {"nats": loss - one.saved, "saved": one.saved, "z": one.z} for one in mine}
        value: dict[str, Any] = {"nats": loss, "readings": numbers}
        trap, reading = best.probe.trap, best.probe.reading
        if not best.is_better:
            margin = f"costs {-best.saved:.3f} nats a token" if best.saved < -NOTICEABLE else "makes no difference"
            found.append(passed(check, f"As configured: the next best reading ({reading}) {margin}.", trap, **value))
            continue
        said = f"Read with {reading}, the text takes {loss - best.saved:.2f} nats a token instead of {loss:.2f}"
        if best is foremost:
            found.append(failed(check, f"{said}: {best.probe.do}.", trap, **value))
        else:
            why = f"less than {foremost.probe.reading} saves, so mend that first and look again"
            found.append(warned(check, f"{said}, {why}.", trap, **value))
    return found


def probes_of(config: ModelConfig) -> Iterator[Probe]:
    """All readings to be tried of such a model."""
    yield from _rotary_probes(config)
    yield from _yarn_probes(config)
    if any(map(config.is_moe, range(config.num_hidden_layers))):
        yield from _choice_probes(config)
        yield from _weight_probes(config)
    yield from _eps_probes(config)


def _configured(check: str, trap: int | None, reading: str, do: str = "", **changes: Any) -> Probe:
    said = ", ".join(f"{key} {value}" for key, value in changes.items())
    return Probe(check, trap, reading, partial(variant, **changes), do or f"config.json should say {said}")


def _rotary_probes(config: ModelConfig) -> Iterator[Probe]:
    for queries, keys in ((True, True), (True, False), (False, True)):
        which = " and ".join(name for name, taken in (("queries", queries), ("keys", keys)) if taken)
        yield Probe(
            "rope-pairing",
            1,
            f"rotary {which} in halves",
            partial(_in_halves, queries=queries, keys=keys),
            f"the rotary rows of the {which} are stored as halves, DeepSeek stores adjacent pairs: interleave them",
        )
    for theta in (10_000.0, 50_000.0):
        if theta != config.rope_theta:
            yield _configured("rope-theta", None, f"rope_theta {theta:g}", rope_theta=theta)


def _yarn_probes(config: ModelConfig) -> Iterator[Probe]:
    yarn, check = config.rope_scaling, "yarn-read"
    if yarn is None:
        do = "rope_scaling seems to be missing from config.json"
        yield _configured(check, 2, "YaRN as DeepSeek-V3 has it", do, rope_scaling=V3_YARN)
        return
    m = yarn_mscale(yarn, yarn.mscale_all_dim)
    do = "see to mscale and mscale_all_dim of rope_scaling"
    for power, reading in ((-2, "YaRN without its softmax factor"), (2, "YaRN's softmax factor squared")):
        if m != 1:
            yield Probe(check, 2, reading, partial(_softmax_scaled, factor=m**power), do)
    if yarn.mscale_all_dim == 0:
        yield _configured(
            check, 2, "mscale_all_dim 1", rope_scaling=yarn.model_copy(update={"mscale": 1.0, "mscale_all_dim": 1.0})
        )
    yield _configured(check, 2, "no YaRN at all", "rope_scaling does not belong to these weights", rope_scaling=None)


def _choice_probes(config: ModelConfig) -> Iterator[Probe]:
    if config.topk_method == "noaux_tc":
        do = "e_score_correction_bias is not the one that these weights were trained with"
        yield Probe("routing-bias-read", 5, "routing biases of zero", _unbiased, do)
    if config.topk_method != "greedy" and config.n_group > 1:
        yield _configured("group-limit-read", 3, "no limit to groups", n_group=1, topk_group=1)
    if config.topk_method == "noaux_tc" and config.n_group > 1:
        do = "the groups' scores are not those of noaux_tc"
        yield _configured("group-limit-read", 3, "groups by their best expert", do, topk_method="group_limited_greedy")


def _weight_probes(config: ModelConfig) -> Iterator[Probe]:
    other = "softmax" if config.scoring_func == "sigmoid" else "sigmoid"
    yield _configured("gate-scores", 4, f"{other} scores", scoring_func=other)
    if config.topk_method == "noaux_tc":
        do = "the gate was trained with weights from biased scores, which no engine for this layout computes"
        yield Probe("gate-weights", 4, "gate weights from biased scores", _biased_weights, do)
    yield _configured(
        "gate-weights",
        4,
        f"gate weights {'as they are' if config.norm_topk_prob else 'normalised'}",
        norm_topk_prob=not config.norm_topk_prob,
    )
    f = config.routed_scaling_factor
    for factor in dict.fromkeys((1.0, f / 2, 2 * f, f * f)):
        if factor != f:
            do = f"the factor of training is nearer {factor:g} than {f:g}; take it from the original config.json"
            reading = f"routed_scaling_factor {factor:g}"
            yield _configured("routed-scale", 4, reading, do, routed_scaling_factor=factor)
    for factor in dict.fromkeys((f, 1 / f)) if config.n_shared_experts and f != 1 else ():
        do = f"the shared experts' down_proj is off by a factor of {factor:g}"
        yield Probe("shared-scale", 4, f"shared experts times {factor:g}", partial(_shared_scaled, factor=factor), do)


def _eps_probes(config: ModelConfig) -> Iterator[Probe]:
    for eps in (1e-5, 1e-6):
        if eps != config.rms_norm_eps:
            do = f"config.json should say rms_norm_eps {eps:g}"
            yield Probe("norm-eps", None, f"rms_norm_eps {eps:g}", partial(_with_eps, eps=eps), do)


def _in_halves(model: Transformer, queries: bool, keys: bool) -> Transformer:
    """As if pair i of the rotary rows were i and i + R/2 in the checkpoint, which are 2i and 2i + 1 to our rotation."""
    copied = variant(model)
    R, width = model.config.qk_rope_head_dim, model.config.qk_head_dim

    def interleaved(_: nn.Module, __: object, out: Tensor, head: int) -> Tensor:
        plain, rotary = out.unflatten(-1, (-1, head)).split([head - R, R], dim=-1)
        rotary = rotary.unflatten(-1, (2, R // 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([plain, rotary], dim=-1).flatten(-2)

    for module in _parts(copied, MLA):
        if queries:
            last = module.q_proj if model.config.q_lora_rank is None else module.q_b_proj
            last.register_forward_hook(partial(interleaved, head=width))
        if keys:
            module.kv_a_proj_with_mqa.register_forward_hook(partial(interleaved, head=model.config.cache_width))
    return copied


def _softmax_scaled(model: Transformer, factor: float) -> Transformer:
    copied = variant(model)
    for module in _parts(copied, MLA):
        module.scale *= factor
    return copied


def _unbiased(model: Transformer) -> Transformer:
    copied = variant(model)
    for gate in _parts(copied, Router):
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias = torch.zeros_like(gate.e_score_correction_bias)
    return copied


def _biased_weights(model: Transformer) -> Transformer:
    copied = variant(model)

    def reweighted(gate: Router, _: object, routing: Routing) -> Routing:
        assert gate.e_score_correction_bias is not None
        biased_TE = routing.scores_TE + gate.e_score_correction_bias
        weights_TK = gate_weights(biased_TE.gather(1, routing.ids_TK), gate.config)
        return Routing(routing.ids_TK, weights_TK, routing.scores_TE)

    for gate in _parts(copied, Router):
        gate.register_forward_hook(reweighted)
    return copied


def _shared_scaled(model: Transformer, factor: float) -> Transformer:
    copied = variant(model)
    for moe in _parts(copied, MoE):
        if moe.shared_experts is not None:
            moe.shared_experts.register_forward_hook(lambda _, __, out: out * factor)
    return copied


def _with_eps(model: Transformer, eps: float) -> Transformer:
    """All norms but those of the latents, which have an eps of their own."""
    copied = variant(model)
    for name, module in copied.named_modules():
        if isinstance(module, RMSNorm) and not name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.eps = eps
    return copied


def _parts(model: Transformer, kind: type[Part]) -> list[Part]:
    return [module for module in model.modules() if isinstance(module, kind)]
