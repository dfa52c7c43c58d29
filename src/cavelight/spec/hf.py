"""The spelling of Hugging Face's config.json, in plain dicts: what it says in our field names, and back.

Two spellings are read: the one of the released checkpoints (`rope_scaling`, `rope_theta`, `torch_dtype`) and that of
transformers 5 (`rope_parameters`, `dtype`, and no `topk_method`, `scoring_func` or `moe_layer_freq`, which its model
classes imply). Written is always the first, complete: transformers, vLLM, SGLang and llama.cpp's converter all read it.
A model with plain attention (attention "gqa") is none of theirs, and its model_type says so: they refuse it by name.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

# Layouts with plain attention, which only we read, under names of their own.
OURS = {"deepseek_v2": "cavelight_gqa_v2", "deepseek_v3": "cavelight_gqa_v3"}
# model_type as written -> the layout it means. Kimi-K2 is a deepseek_v3 under another name.
LAYOUTS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    **{ours: layout for layout, ours in OURS.items()},
}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
# What transformers 5 leaves out of config.json, because its model classes compute nothing else.
IMPLIED = {
    "deepseek_v2": {"topk_method": "greedy", "scoring_func": "softmax", "moe_layer_freq": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
}

# Keys that other models set and this architecture does not have: the one value that changes nothing, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the experts are SwiGLU"),
    "attention_bias": (False, "no projection has a bias"),
    "mlp_bias": (False, "no projection has a bias"),
    "attention_dropout": (0, "there is no dropout"),
    "pretraining_tp": (1, "projections are computed whole, never in slices"),
    "rope_interleave": (True, "rotary pairs are adjacent dimensions (2i, 2i+1)"),
    "sliding_window": (None, "attention reaches the whole past"),
    "use_sliding_window": (False, "attention reaches the whole past"),
    "partial_rotary_factor": (1, "qk_rope_head_dim says what is rotated"),
    "is_encoder_decoder": (False, "the model is a decoder"),
    "add_cross_attention": (False, "the model is a decoder"),
    "pruned_heads": ({}, "heads are never pruned"),
}

# Keys that say nothing about the mathematics: kept, and written back as they were.
_OF_TRANSFORMERS = """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation auto_map transformers_version
    quantization_config use_cache ep_size output_router_logits router_aux_loss_coef chunk_size_feed_forward
    id2label label2id problem_type finetuning_task task_specific_params tokenizer_class prefix is_decoder
    return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder
    cross_attention_hidden_size decoder_start_token_id sep_token_id
"""
_OF_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
HARMLESS = frozenset((_OF_TRANSFORMERS + _OF_GENERATION).split())

_YARN_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


def fields_of(raw: Mapping[str, Any], known: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """Translate a config.json into fields named `known`; returns them and what is wrong, one sentence each."""
    left = dict(raw)
    fields: dict[str, Any] = {"extra": {}}
    problems: list[str] = []
    _take_model_type(left, fields, problems)
    _take_rope(left, fields, problems)
    _take_aliases(left, problems)
    _take_derived(left, problems)
    for key, (only, why) in FIXED.items():
        value = left.pop(key, None)
        if value is not None and value != only:
            problems.append(f"{key} is {value!r}, but this architecture has only {only!r}: {why}")
    for key, value in left.items():
        if key in known:
            fields[key] = value
        elif key in HARMLESS:
            fields["extra"][key] = value
        else:
            problems.append(unknown(key, value, known))
    _normalise(fields)
    return fields, problems


def hf_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a configuration's fields (nested models already dumped to dicts), in the classic spelling."""
    raw = dict(fields)
    extra, yarn = raw.pop("extra"), raw.pop("rope_scaling")
    if raw["mtp_hidden"] == "post_norm":  # what released checkpoints mean by silence
        del raw["mtp_hidden"]
    # transformers wants integers here, and builds no experts where first_k_dense_replace covers all layers.
    raw["n_routed_experts"] = raw["n_routed_experts"] or 0
    raw["n_shared_experts"] = raw["n_shared_experts"] or 0
    if raw["attention"] == "mla":
        del raw["attention"]
        raw |= {"architectures": [ARCHITECTURES[raw["model_type"]]], "num_key_value_heads": raw["num_attention_heads"]}
    else:
        raw["model_type"] = OURS[raw["model_type"]]
    raw |= {
        # `type` is what the released checkpoints' code reads, `rope_type` what everything newer does.
        "rope_scaling": None if yarn is None else {"type": "yarn", "rope_type": "yarn", **yarn},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
    }
    return dict(sorted((raw | extra).items()))


def unknown(name: str, value: Any, known: Iterable[str]) -> str:
    """The sentence about a key that is none of `known`, with the one that was perhaps meant."""
    close = get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0.8)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name} is unknown and may change the mathematics (its value: {value!r}){hint}"


def _take_model_type(left: dict[str, Any], fields: dict[str, Any], problems: list[str]) -> None:
    stored = left.pop("model_type", None)
    names = left.pop("architectures", None)
    layout = LAYOUTS.get(stored) if isinstance(stored, str) else None
    if layout is None:
        found = "missing" if stored is None else repr(stored)
        problems.append(f"model_type is {found}, but must be one of {', '.join(LAYOUTS)}")
        return
    fields["model_type"] = layout
    ours = stored in OURS.values()
    if ours != (left.get("attention", "mla") == "gqa"):
        problems.append(f"attention is {left.get('attention')!r}, but a {stored} has {'gqa' if ours else 'mla'}")
    if stored != layout and not ours:
        fields["extra"]["model_type"] = stored
    if names and names != [ARCHITECTURES[layout]]:
        problems.append(f"architectures is {names!r}, but a {stored} language model is [{ARCHITECTURES[layout]!r}]")
    for key, value in IMPLIED[layout].items():
        if left.get(key) is None:
            left[key] = value


def _take_rope(left: dict[str, Any], fields: dict[str, Any], problems: list[str]) -> None:
    """Read `rope_scaling` + `rope_theta` and `rope_parameters`; given both, they must say the same."""
    classic, modern = left.pop("rope_scaling", None), left.pop("rope_parameters", None)
    thetas = [left.pop("rope_theta", None)]
    readings: list[dict[str, Any] | None] = []
    for key, value in (("rope_scaling", classic), ("rope_parameters", modern)):
        if isinstance(value, Mapping):
            thetas.append(value.get("rope_theta"))
            readings.append(_yarn_fields(key, value, problems))
        elif value is not None:
            problems.append(f"{key} must be an object, got {value!r}")
    if len(readings) == 2 and readings[0] != readings[1]:
        problems.append("rope_scaling and rope_parameters contradict each other")
    given = [theta for theta in thetas if theta is not None]
    if any(theta != given[0] for theta in given):
        problems.append(f"rope_theta is given more than once, as {' and '.join(map(repr, given))}")
    if given:
        fields["rope_theta"] = given[0]
    fields["rope_scaling"] = readings[0] if readings else None


def _yarn_fields(where: str, value: Mapping[str, Any], problems: list[str]) -> dict[str, Any] | None:
    kinds = {str(kind) for kind in (value.get("type"), value.get("rope_type")) if kind is not None} or {"default"}
    if kinds == {"default"}:
        if value.get("factor") not in (None, 1):
            problems.append(
                f"{where} has a factor ({value['factor']!r}) but is not of type yarn: positions would not be stretched"
            )
        return None
    if kinds != {"yarn"}:
        problems.append(f"{where} has type {' and '.join(sorted(kinds))}, but only yarn and default are known")
        return None
    known = {key: value[key] for key in _YARN_KEYS if value.get(key) is not None}
    for key in value.keys() - {"type", "rope_type", "rope_theta", *_YARN_KEYS}:
        if value[key] is not None:
            problems.append(unknown(f"{where}.{key}", value[key], _YARN_KEYS))
    return known


def _take_aliases(left: dict[str, Any], problems: list[str]) -> None:
    """Give keys that transformers 5 renamed their classic name; both at once must agree."""
    for modern, classic in (("dtype", "torch_dtype"), ("num_mtp_layers", "num_nextn_predict_layers")):
        value = left.pop(modern, None)
        if left.get(classic) is None:
            left.pop(classic, None)
            if value is not None:
                left[classic] = value
        elif value is not None and value != left[classic]:
            problems.append(f"{modern} is {value!r}, but {classic} is {left[classic]!r}: they are the same thing")


def _take_derived(left: dict[str, Any], problems: list[str]) -> None:
    """Drop what follows from other fields, if it does follow."""
    plain = left.get("attention") == "gqa"
    heads, kv_heads = left.get("num_attention_heads"), None if plain else left.pop("num_key_value_heads", None)
    if kv_heads is not None and kv_heads != heads:
        problems.append(f"num_key_value_heads is {kv_heads!r}, but latent attention has one per head ({heads!r})")
    nope, rope = left.get("qk_nope_head_dim"), left.get("qk_rope_head_dim")
    qk_head_dim, head_dim = left.pop("qk_head_dim", None), left.pop("head_dim", None)
    if not (isinstance(nope, int) and isinstance(rope, int)):
        return
    if qk_head_dim not in (None, nope + rope):
        problems.append(f"qk_head_dim is {qk_head_dim!r}, but qk_nope_head_dim + qk_rope_head_dim is {nope + rope}")
    if head_dim not in (None, rope, nope + rope):
        problems.append(f"head_dim is {head_dim!r}, but the heads are {rope} (rotary) and {nope + rope} (whole) wide")


def _normalise(fields: dict[str, Any]) -> None:
    """One spelling for what several say: no groups, no experts, no shared experts."""
    for key in ("n_group", "topk_group"):
        if fields.get(key, 0) is None:
            fields[key] = 1
    for key in ("n_routed_experts", "n_shared_experts"):
        if fields.get(key) == 0:
            fields[key] = None
    if "n_routed_experts" in fields and fields["n_routed_experts"] is None:
        for key, value in (("moe_intermediate_size", 0), ("num_experts_per_tok", 0)):
            if fields.get(key) is None:
                fields[key] = value
        fields["first_k_dense_replace"] = fields.get("num_hidden_layers")
