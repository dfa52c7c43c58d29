"""Checks of config.json alone. They read it as it stands, so that they speak even where it cannot be built."""

from collections.abc import Iterator, Mapping
from typing import Any

from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.spec.config import ModelConfig
from cavelight.spec.hf import IMPLIED, LAYOUTS
from cavelight.spec.presets import preset

# What others do where config.json leaves a key out, as transformers 5 does with the first three.
WITHOUT = {
    "scoring_func": "llama.cpp gates with softmax and says nothing",
    "topk_method": "vLLM and SGLang stop",
    "moe_layer_freq": "SGLang and TensorRT-LLM stop",
    "norm_topk_prob": "everybody takes a default of their own",
    "routed_scaling_factor": "everybody takes a default of their own",
}
RELEASED = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "moonlight-16b-a3b", "kimi-k2")
# Two models of one shape agree in these ...
_OF_SHAPE = """
    model_type hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads q_lora_rank
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts first_k_dense_replace
"""
# ... and then in these, which no weight shows: the key, the trap, and whether a later training may have changed it.
FAMILY: dict[str, tuple[int | None, bool]] = {
    "n_group": (3, False),
    "topk_group": (3, False),
    "num_experts_per_tok": (4, False),
    "topk_method": (4, False),
    "scoring_func": (4, False),
    "norm_topk_prob": (4, False),
    "routed_scaling_factor": (4, False),
    "rms_norm_eps": (None, True),
    "rope_theta": (None, True),
    "rope_scaling": (2, True),
}


def readable(case: Case) -> Iterator[Finding]:
    """Whether configuration and storage format can be read at all."""
    if refusal := case.refusals.get("config"):
        yield failed("config", str(refusal))
    elif case.config is not None:
        yield passed("config", f"config.json describes a model that can be built: {_described(case.config)}.")
    if refusal := case.refusals.get("format"):
        yield failed("format", str(refusal))


def keys(case: Case) -> Iterator[Finding]:
    """Keys that follow from the model's class here and in transformers, but not elsewhere."""
    if not case.raw.get("n_routed_experts"):
        return
    missing = [key for key in WITHOUT if case.raw.get(key) is None]
    if missing:
        reasons = "; ".join(f"without {key} {WITHOUT[key]}" for key in missing)
        yield warned("keys", f"config.json does not say everything: {reasons}; write it out.", 4, missing=missing)
    else:
        yield passed("keys", "config.json names the gate in full, so no engine has to guess.")


def rotary_dims(case: Case) -> Iterator[Finding]:
    """Trap 1, the part that a configuration shows."""
    width = _whole(case.raw, "qk_rope_head_dim")
    if width is not None and width % 2:
        yield failed(
            "rotary-dims",
            f"qk_rope_head_dim is {width}, but rotary dimensions come in pairs, so one would be left over: the "
            "weights cannot be those of such a model, correct the number.",
            1,
        )
    theta = case.raw.get("rope_interleave")
    if theta is False:
        yield failed(
            "rotary-dims",
            "rope_interleave is false, which asks for halves to be rotated, but weights in this layout pair adjacent "
            "rows (2i, 2i+1): remove the key, or reorder the rotary rows of queries and keys both.",
            1,
        )


def yarn(case: Case) -> Iterator[Finding]:
    """Trap 2: YaRN scales cos and sin in one place and the softmax in another."""
    rope = _rope(case.raw)
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor == 1 or abs(factor) > 1e9:  # the last is for config to refuse
        yield passed("yarn", "Positions are not stretched (no YaRN), so there is no scale to mistake.")
        return
    if (rope.get("rope_type") or rope.get("type") or "default") not in ("yarn", "default"):
        return  # config refuses other kinds of stretching
    problems = list(_yarn_problems(rope, float(factor), case.raw))
    yield from problems
    if not problems:
        yield passed("yarn", f"YaRN stretches by {factor:g}, and both its scales are given.", 2)


def _yarn_problems(rope: Mapping[str, Any], factor: float, raw: Mapping[str, Any]) -> Iterator[Finding]:
    kind = rope.get("rope_type") or rope.get("type")
    if kind in (None, "default"):
        seen = "no rope_type" if kind is None else "rope_type default"
        yield failed(
            "yarn",
            f"rope_scaling has a factor of {factor:g} but {seen}, so it is read as no stretching at all and far "
            'positions go wrong: add "rope_type": "yarn".',
            2,
        )
        return
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not all_dim:
        yield warned(
            "yarn",
            f"rope_scaling has a factor of {factor:g} without mscale_all_dim, so the softmax scale is not raised, "
            "while every released model of this kind raises it: set mscale_all_dim to what training used.",
            2,
        )
    elif mscale is None:
        yield warned(
            "yarn",
            f"rope_scaling has mscale_all_dim {all_dim} without mscale, which transformers and DeepSeek's code read "
            f"differently: write mscale too ({all_dim} leaves cos and sin as they are).",
            2,
        )
    elif mscale != all_dim:
        yield warned(
            "yarn",
            f"mscale ({mscale}) differs from mscale_all_dim ({all_dim}), so cos and sin are scaled besides the "
            "softmax, which no released model does: check both against the training's configuration.",
            2,
        )
    original = _whole(rope, "original_max_position_embeddings")
    longest = _whole(raw, "max_position_embeddings")
    if original is not None and longest is not None and original * factor < longest:
        yield warned(
            "yarn",
            f"max_position_embeddings is {longest:,}, but YaRN reaches only to {original:,} x {factor:g} = "
            f"{original * factor:,.0f}: past that, positions are as strange as without it; lower the one or raise "
            "the other.",
            2,
        )


def group_limit(case: Case) -> Iterator[Finding]:
    """Trap 3, the part that a configuration shows."""
    raw = case.raw
    experts, chosen = _whole(raw, "n_routed_experts"), _whole(raw, "num_experts_per_tok")
    groups, kept = _whole(raw, "n_group") or 1, _whole(raw, "topk_group") or 1
    if not experts:
        return
    if kept > groups or experts % groups:
        yield failed(
            "group-limit",
            f"{experts} experts in {groups} groups, {kept} of them kept for a token, do not come out even: correct "
            "n_group and topk_group.",
            3,
        )
    elif (method := _gate_of(raw)["topk_method"]) == "noaux_tc" and groups > 1 and experts // groups < 2:
        yield failed(
            "group-limit",
            f"n_group is {groups} for {experts} experts, but noaux_tc scores a group by its two best: correct n_group.",
            3,
        )
    elif chosen and method != "greedy" and chosen > experts // groups * kept:
        yield failed(
            "group-limit",
            f"{kept} of {groups} groups hold {experts // groups * kept} experts, fewer than the {chosen} that a token "
            "chooses, so masked ones would be chosen: correct topk_group.",
            3,
        )
    elif groups > 1 and (kept == groups or method == "greedy"):
        why = "topk_method greedy ignores groups" if method == "greedy" else "all of them are kept"
        yield warned(
            "group-limit",
            f"n_group is {groups}, but {why}, so nothing is limited: n_group and topk_group of 1 say the same, and "
            "anything else is a mistake.",
            3,
        )
    else:
        said = f"{kept} of {groups} groups" if groups > 1 else "no groups"
        yield passed("group-limit", f"A token chooses {chosen} of {experts} experts in {said}, which comes out even.")


def gate(case: Case) -> Iterator[Finding]:
    """Trap 4: what the weights of the chosen experts are made of."""
    raw = case.raw
    if not raw.get("n_routed_experts"):
        return
    parts = _gate_of(raw)
    method, score = parts["topk_method"], parts["scoring_func"]
    normalised, factor = raw.get("norm_topk_prob"), raw.get("routed_scaling_factor")
    layout = LAYOUTS.get(str(raw.get("model_type")))
    if layout and (score != IMPLIED[layout]["scoring_func"] or (method == "noaux_tc") != (layout == "deepseek_v3")):
        yield failed(
            "gate",
            f"scoring_func is {score} and topk_method {method}, which no {layout} has: engines go by the model's class "
            "or by these keys, and then differ; correct them.",
            4,
        )
    elif layout == "deepseek_v2" and normalised:
        yield failed(
            "gate",
            "norm_topk_prob is true in a deepseek_v2, where DeepSeek's code then leaves the scaling factor out and "
            "transformers leaves out the normalising: set it to false, as all released ones have it.",
            4,
        )
    elif score == "sigmoid" and normalised is False:
        yield warned(
            "gate",
            "norm_topk_prob is false with sigmoid scores, so the weights of a token's experts add up to anything: "
            "set it to true, unless the model was trained so.",
            4,
        )
    elif score == "sigmoid" and factor in (None, 1, 1.0) and (_whole(raw, "num_experts_per_tok") or 0) > 1:
        yield warned(
            "gate",
            "routed_scaling_factor is 1 with normalised sigmoid scores, which makes routed experts too quiet beside "
            "the shared one (V3 has 2.5): correct it, unless the model was trained so.",
            4,
        )
    else:
        how = f"{score} scores, {'normalised, ' if normalised else ''}times {factor}"
        yield passed("gate", f"The experts' weights are {how}, chosen by {method}.")


def family(case: Case) -> Iterator[Finding]:
    """Hold the configuration against the released model of the same shape, if there is one."""
    config = case.config
    if config is None:
        return
    for name in RELEASED:
        known = preset(name)
        if all(getattr(known, key) == getattr(config, key) for key in _OF_SHAPE.split()):
            different = [key for key in FAMILY if getattr(known, key) != getattr(config, key)]
            for key in different:
                yield _stranger(key, config, known, name)
            if not different:
                yield passed("family", f"Shape and gate are those of {name}.", preset=name)
            return


def _stranger(key: str, config: ModelConfig, known: ModelConfig, name: str) -> Finding:
    trap, may_change = FAMILY[key]
    ours, theirs = getattr(config, key), getattr(known, key)
    seen = f"The model has the shape of {name}, but {key} is {ours!s} and not {theirs!s}"
    if may_change:
        return warned("family", f"{seen}: right only if it was trained on with that; check its source.", trap, key=key)
    return failed("family", f"{seen}, which no later training changes: correct it.", trap, key=key)


def training_values(case: Case) -> Iterator[Finding]:
    """The two keys that every released config.json carries and that nobody trained with."""
    if case.raw.get("aux_loss_alpha") == 0.001 and case.raw.get("initializer_range") == 0.02:
        yield passed(
            "training-values",
            "aux_loss_alpha 0.001 and initializer_range 0.02 are what every config.json says, not what V3 was trained "
            "with (0.0001 and 0.006); running a model needs neither.",
        )


def _described(config: ModelConfig) -> str:
    experts = f", {config.n_routed_experts} experts" if config.n_routed_experts else ""
    modules = f", {config.num_nextn_predict_layers} MTP" if config.num_nextn_predict_layers else ""
    return f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}{experts}{modules}"


def _gate_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """topk_method and scoring_func, also where only the model's class implies them."""
    implied = IMPLIED[LAYOUTS.get(str(raw.get("model_type")), "deepseek_v3")]
    return {key: raw.get(key) or implied[key] for key in ("topk_method", "scoring_func")}


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(key), Mapping):
            return dict(raw[key])
    return {}


def _whole(raw: Mapping[str, Any], key: str) -> int | None:
    value = raw.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


CHECKS = (readable, keys, rotary_dims, yarn, group_limit, gate, family, training_values)
