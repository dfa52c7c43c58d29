"""Why a part of a layer may differ: each known mistake is computed, and the one that gives their values is named.

Letters: T tokens, D hidden size, H heads, R rotary width, E experts, K experts a token, G groups of X experts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.doctor.record import Record
from cavelight.model.layers import rotary_frequencies, yarn_mscale
from cavelight.model.mla import LATENT_NORM_EPS
from cavelight.model.router import choose, gate_weights, is_group_limited
from cavelight.spec.config import ModelConfig

ALIKE = 1e-3  # relative: two computations of the same thing differ by less, two different things by more


@dataclass(frozen=True)
class Suspicion:
    """A number in docs/doctor.md, or None, and what the other side seems to do."""

    trap: int | None
    why: str


@dataclass(frozen=True)
class Scene:
    """A layer's records of both sides, and what else computes them."""

    ours: Record
    theirs: Record
    config: ModelConfig
    cos_sin: tuple[Tensor, Tensor]  # [T, R/2] each
    bias_E: Tensor | None


def suspect(part: str, scene: Scene) -> Suspicion:
    """The likely mistake behind the first part that differs; what comes before it agrees."""
    if part.endswith(("norm", "latent")):
        return _of_norm(part, scene)
    find = _FINDERS.get(part)
    return find(scene) if find else Suspicion(None, _PLAIN.get(part, "the weights are not the same"))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same but for rounding."""
    return bool((a - b).abs().max() <= ALIKE * b.abs().max().clamp(min=1e-30))


def in_our_order(theirs: Tensor, ours: Tensor) -> Tensor:
    """Rotated values [..., R] as adjacent pairs: transformers' V3 puts all first members before all second ones."""
    paired = theirs.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return theirs if (theirs - ours).abs().max() <= (paired - ours).abs().max() else paired


def constant_ratio(theirs: Tensor, ours: Tensor) -> float | None:
    """The factor by which `theirs` are `ours` throughout, None if there is none."""
    ratio = float((theirs * ours).sum() / (ours * ours).sum().clamp(min=1e-30))
    return ratio if alike(theirs, ours * ratio) else None


def suspect_angles(theirs: tuple[Tensor, Tensor], positions_T: Tensor, config: ModelConfig) -> Suspicion:
    """Why cos and sin [T, R/2] differ; position 1 must be among `positions_T`, as it shows the frequencies."""
    cos, sin = theirs
    yarn = config.rope_scaling
    length = float((cos**2 + sin**2).sqrt().mean())
    expected = yarn_mscale(yarn, yarn.mscale) / yarn_mscale(yarn, yarn.mscale_all_dim) if yarn else 1.0
    if abs(length / expected - 1) > ALIKE:
        why = f"cos and sin are {length:.4g} long instead of {expected:.4g}, which is m(mscale) / m(mscale_all_dim)"
        return Suspicion(2, why)
    at = int((positions_T == 1).nonzero()[0])
    frequencies = torch.atan2(sin[at], cos[at])
    plain = rotary_frequencies(config.qk_rope_head_dim, config.rope_theta, None)
    if yarn is not None and alike(frequencies, plain):
        return Suspicion(2, "their frequencies are those without YaRN")
    if yarn is not None and alike(frequencies, plain / yarn.factor):
        return Suspicion(2, "all their frequencies are divided by YaRN's factor, and not the slow ones alone")
    if frequencies.numel() > 1 and frequencies[-1] > 0:
        theta = float(frequencies[-1]) ** (-1 / (1 - 1 / frequencies.numel()))
        if alike(frequencies, rotary_frequencies(config.qk_rope_head_dim, theta, None)):
            return Suspicion(None, f"their rope_theta is about {theta:.6g}, ours {config.rope_theta:.6g}")
    return Suspicion(2, "their frequencies are others: see to YaRN's betas, factor and original length")


def _of_norm(part: str, scene: Scene) -> Suspicion:
    inputs = {
        "input norm": "layer input",
        "query latent": "query latent before its norm",
        "latent": "latent and rotary key before",
        "post-attention norm": "post-attention norm input",
    }
    latent = part.endswith("latent")
    ours_eps = LATENT_NORM_EPS if latent else scene.config.rms_norm_eps
    x = scene.ours[inputs[part]][:, : scene.ours[part].shape[1]] if part in inputs else None
    eps = None if x is None else eps_of(scene.theirs[part], scene.ours[part], x, ours_eps)
    if eps is None:
        return Suspicion(None, f"the weight of the {part} is not the same, or is applied otherwise")
    why = f"their eps is about {eps:.1g}, ours {ours_eps:.1g}"
    return Suspicion(None, f"{why}: the norms of the latents have 1e-6 whatever rms_norm_eps says" if latent else why)


def eps_of(theirs: Tensor, ours: Tensor, x: Tensor, eps: float) -> float | None:
    """The eps that makes `ours`, an RMSNorm of `x` with `eps`, into `theirs`; None if no eps does."""
    ratios_T = (theirs * ours).sum(dim=-1) / (ours * ours).sum(dim=-1).clamp(min=1e-30)
    if not alike(theirs, ours * ratios_T[:, None]):
        return None
    squares_T = x.double().pow(2).mean(dim=-1)
    found_T = (squares_T + eps) / ratios_T.double() ** 2 - squares_T
    return float(found_T[squares_T.argmin()])  # where eps weighs most


def _of_rotary(part: str) -> Callable[[Scene], Suspicion]:
    def find(scene: Scene) -> Suspicion:
        R = scene.config.qk_rope_head_dim
        if part == "rotary key":
            before = scene.ours["latent and rotary key before"][:, -R:]
        else:
            before = scene.ours["queries"].unflatten(-1, (scene.config.num_attention_heads, -1))[..., -R:]
        cos, sin = (t if before.ndim == 2 else t[:, None] for t in scene.cos_sin)
        first, second = before.chunk(2, dim=-1)
        even, odd = before[..., 0::2], before[..., 1::2]
        readings = {
            "rotates halves, while the checkpoint pairs adjacent dimensions": (
                first * cos - second * sin,
                second * cos + first * sin,
            ),
            "rotates the other way round": (even * cos + odd * sin, odd * cos - even * sin),
            "does not rotate": (even, odd),
        }
        for said, pair in readings.items():
            expected = torch.stack(pair, dim=-1).flatten(-2)
            if alike(in_our_order(scene.theirs[part], expected), expected):
                return Suspicion(1, f"it {said} ({part})")
        ratio = constant_ratio(scene.theirs[part].norm(dim=-1), scene.ours[part].norm(dim=-1))
        if ratio is not None and abs(ratio - 1) > ALIKE:
            return Suspicion(2, f"cos and sin are scaled {ratio:.4g} times ({part})")
        return Suspicion(1, f"other dimensions are paired, or one of queries and keys is de-interleaved alone ({part})")

    return find


def _of_scores(scene: Scene) -> Suspicion:
    ratio = constant_ratio(scene.theirs["attention scores"], scene.ours["attention scores"])
    if ratio is None:
        return Suspicion(1, "queries and keys agree, their products do not: the two are ordered differently")
    config, yarn = scene.config, scene.config.rope_scaling
    m = yarn_mscale(yarn, yarn.mscale_all_dim) if yarn else 1.0
    width, N, L = config.qk_head_dim, config.qk_nope_head_dim, config.cache_width
    known = {
        "the factor m(mscale_all_dim)^2 is left out": m**-2,
        "m(mscale_all_dim) is taken once instead of squared": 1 / m,
        "m(mscale_all_dim)^2 is taken twice": m**2,
        "scaled by the width without position alone": math.sqrt(width / N),
        "scaled by the width of a cache row instead of a head's": math.sqrt(width / L),
    }
    for said, factor in known.items():
        if factor != 1 and abs(ratio / factor - 1) < ALIKE:
            return Suspicion(2, f"scores are {ratio:.4g} times ours: {said}")
    return Suspicion(2, f"scores are {ratio:.4g} times ours: another softmax scale (mscale)")


def _of_choice(scene: Scene) -> Suspicion:
    config, bias_E = scene.config, scene.bias_E
    scores_TE, theirs_TE = scene.ours["gate scores"], scene.theirs["chosen experts"]

    def gives_theirs(ids_TK: Tensor) -> bool:
        chosen_TE = torch.zeros_like(theirs_TE).scatter(1, ids_TK, 1.0)
        return float((chosen_TE != theirs_TE).any(dim=1).float().mean()) < 0.005  # near-ties apart

    for said, trap, ids_TK in _choices(scores_TE, bias_E, config):
        if gives_theirs(ids_TK):
            return Suspicion(trap, said)
    return Suspicion(3 if is_group_limited(config) else 5, "scores agree: see to the limit to groups and the bias")


def _choices(scores_TE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> Iterator[tuple[str, int, Tensor]]:
    """Mistaken ways to choose, each with its trap."""
    K = config.num_experts_per_tok
    if bias_E is not None:
        yield "the bias is left out of the choice", 5, choose(scores_TE, None, config)
        yield "the bias is subtracted", 5, choose(scores_TE, -bias_E, config)
        yield "the bias is rounded to bfloat16", 5, choose(scores_TE, bias_E.bfloat16().float(), config)
    if not is_group_limited(config):
        return
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    yield "the choice is not limited to groups", 3, choice_TE.topk(K).indices
    by_groups = {
        "groups are scored by their best expert": choice_TE.unflatten(1, (config.n_group, -1)).amax(-1),
        "groups are scored by the sum of their two best": choice_TE.unflatten(1, (config.n_group, -1))
        .topk(2)[0]
        .sum(-1),
        "groups are scored without the bias": scores_TE.unflatten(1, (config.n_group, -1)).topk(2)[0].sum(-1),
    }
    right_TG = by_groups["groups are scored by the sum of their two best"]
    if config.topk_method != "noaux_tc":
        right_TG = by_groups["groups are scored by their best expert"]
    zero_masked_TE = _limited(choice_TE, right_TG, config, 0.0)
    yield "experts of other groups are masked with 0 instead of -inf", 3, zero_masked_TE.topk(K).indices
    for said, groups_TG in by_groups.items():
        yield said, 3, _limited(choice_TE, groups_TG, config, -math.inf).topk(K).indices


def _limited(choice_TE: Tensor, groups_TG: Tensor, config: ModelConfig, masked: float) -> Tensor:
    kept_TM = groups_TG.topk(config.topk_group).indices
    kept_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter(1, kept_TM, True)
    return choice_TE.masked_fill(~kept_TG.repeat_interleave(choice_TE.shape[1] // config.n_group, dim=1), masked)


def _of_weights(scene: Scene) -> Suspicion:
    config, factor = scene.config, scene.config.routed_scaling_factor
    ours_TE, theirs_TE = _same_choice(scene, "gate weights")
    ratio = constant_ratio(theirs_TE, ours_TE)
    if ratio is not None:
        for said, known in (("left out", 1 / factor), ("taken twice", factor)):
            if factor != 1 and abs(ratio / known - 1) < ALIKE:
                return Suspicion(4, f"weights are {ratio:.4g} times ours: routed_scaling_factor is {said}")
        return Suspicion(4, f"weights are {ratio:.4g} times ours: see to routed_scaling_factor")
    scores_TE, _ = _same_choice(scene, "gate scores")
    ids_TK = ours_TE.topk(config.num_experts_per_tok).indices

    def weights_from(all_TE: Tensor, reading: ModelConfig) -> Tensor:
        return torch.zeros_like(all_TE).scatter(1, ids_TK, gate_weights(all_TE.gather(1, ids_TK), reading))

    flipped = config.model_copy(update={"norm_topk_prob": not config.norm_topk_prob})
    readings = {f"weights are {'not ' if config.norm_topk_prob else ''}normalised": weights_from(scores_TE, flipped)}
    if scene.bias_E is not None:
        readings["weights come from the biased scores"] = weights_from(scores_TE + scene.bias_E, config)
        both = weights_from(scores_TE + scene.bias_E, flipped)
        readings["weights come from the biased scores, and the normalisation is another"] = both
    for said, expected_TE in readings.items():
        scaled = constant_ratio(theirs_TE, expected_TE)
        if scaled is not None:
            more = "" if abs(scaled - 1) < ALIKE else f", and are {scaled:.4g} times as large besides"
            return Suspicion(4, said + more)
    return Suspicion(4, "scores and choice agree, weights do not: see to normalisation, bias and scoring_func")


def _same_choice(scene: Scene, part: str) -> tuple[Tensor, Tensor]:
    """A part of both sides, of the tokens that both send to the same experts."""
    same_T = (scene.ours["chosen experts"] == scene.theirs["chosen experts"]).all(dim=1)
    return scene.ours[part][same_T], scene.theirs[part][same_T]


def _of_gate(scene: Scene) -> Suspicion:
    ours_TE, theirs_TE = scene.ours["gate scores"], scene.theirs["gate scores"]
    if (ours_TE - theirs_TE).abs().max() < 0.02:
        return Suspicion(5, "close to ours: their gate is computed in a lower precision than float32")
    return Suspicion(5, "the gate's weight or its scoring is not the same")


def _scaled_part(part: str) -> Callable[[Scene], Suspicion]:
    def find(scene: Scene) -> Suspicion:
        ours, theirs = _same_choice(scene, part)
        ratio = constant_ratio(theirs, ours)
        if ratio is None:
            return Suspicion(None, f"the weights of the {part} are not the same")
        rule = "are never scaled" if part == "shared experts" else "are scaled once, in the gate's weights"
        return Suspicion(4, f"{part} are {ratio:.4g} times ours, and {rule}")

    return find


def _of_feed_forward(scene: Scene) -> Suspicion:
    if "shared experts" not in scene.ours:
        return Suspicion(None, "the weights of the feed-forward are not the same, or its activation")
    ours, theirs = scene.ours, scene.theirs
    parts = torch.stack([ours["routed experts"].flatten(), ours["shared experts"].flatten()], dim=1).double()
    target = theirs["feed-forward"].flatten().double()[:, None]
    routed, shared = torch.linalg.lstsq(parts, target).solution[:, 0].tolist()
    return Suspicion(4, f"the sum is {routed:.3g} times the routed experts and {shared:.3g} times the shared ones")


_FINDERS: dict[str, Callable[[Scene], Suspicion]] = {
    "rotary queries": _of_rotary("rotary queries"),
    "rotary key": _of_rotary("rotary key"),
    "attention scores": _of_scores,
    "gate scores": _of_gate,
    "chosen experts": _of_choice,
    "gate weights": _of_weights,
    "routed experts": _scaled_part("routed experts"),
    "shared experts": _scaled_part("shared experts"),
    "feed-forward": _of_feed_forward,
}
_PLAIN = {
    "queries": "the weights of the query projection are not the same",
    "keys": "kv_b_proj is not the same, or split otherwise: each head has its keys' rows before its values'",
    "values": "kv_b_proj is not the same, or split otherwise: each head has its keys' rows before its values'",
    "mixed values": "scores and values agree: the mask or the softmax is another",
    "attention": "the weights of o_proj are not the same",
    "layer output": "the residual stream is joined otherwise",
}
