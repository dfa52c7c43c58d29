"""Every mistake that a configuration can hold is told in a sentence of its own, and all of them at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.hf import FIXED
from cavelight.spec.presets import preset, preset_names


def complaint(changes: dict[str, Any], base: str = "nano") -> str:
    """The message about a preset's config.json with `changes`; a key set to ... is taken out."""
    raw = {
        key: value
        for key, value in (json.loads(json.dumps(preset(base).to_hf())) | changes).items()
        if value is not ...
    }
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(raw)
    return str(caught.value)


WRONG_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "pretraining_tp": 2,
    "rope_interleave": False,
    "sliding_window": 4096,
    "use_sliding_window": True,
    "partial_rotary_factor": 0.5,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "pruned_heads": {"0": [1]},
}


@pytest.mark.parametrize("key", FIXED)
def test_keys_that_would_change_the_mathematics_have_one_value(key: str) -> None:
    assert f"{key} is {WRONG_FIXED[key]!r}, but this architecture has only" in complaint({key: WRONG_FIXED[key]})
    raw = preset("nano").to_hf()
    assert ModelConfig.from_hf(raw | {key: FIXED[key][0]}) == ModelConfig.from_hf(raw | {key: None}) == preset("nano")


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        # Unknown keys, contradictions and what belongs to other models.
        ({"index_topk": 2048}, "index_topk is unknown and may change the mathematics (its value: 2048)"),
        ({"num_hiden_layers": 3}, "num_hiden_layers is unknown and may change the mathematics (its value: 3); did you"),
        ({"extra": {}}, "extra is unknown"),
        ({"model_type": "llama"}, "model_type is 'llama', but must be one of deepseek_v2, deepseek_v3, kimi_k2"),
        ({"model_type": ...}, "model_type is missing, but must be one of"),
        ({"architectures": ["DeepseekV3Model"]}, "architectures is ['DeepseekV3Model'], but a deepseek_v3 language"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, but latent attention has one per head (4)"),
        ({"head_dim": 128}, "head_dim is 128, but the heads are 8 (rotary) and 24 (whole) wide"),
        ({"qk_head_dim": 16}, "qk_head_dim is 16, but qk_nope_head_dim + qk_rope_head_dim is 24"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings should be False, got True"),
        ({"dtype": "float32"}, "dtype is 'float32', but torch_dtype is 'bfloat16': they are the same thing"),
        ({"num_mtp_layers": 2}, "num_mtp_layers is 2, but num_nextn_predict_layers is 1"),
        # Rotary embedding.
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling has type linear, but only yarn and default"),
        ({"rope_scaling": YARN | {"rope_type": "longrope"}}, "rope_scaling has type longrope and yarn, but only"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "rope_scaling.attention_factor is unknown"),
        ({"rope_scaling": YARN | {"beta_fats": 2.0}}, "did you mean beta_fast?"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor should be greater than or equal to 1, got 0.5"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "rope_scaling.beta_fast (0.5) is less than beta_slow (1.0)"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "rope_scaling.mscale is 0.7 without mscale_all_dim"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.original_max_position_embeddings is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8}}, "contradict each other"),
        ({"rope_parameters": {"rope_theta": 5e4}}, "rope_theta is given more than once, as 10000.0 and 50000.0"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, but rotary dimensions come in pairs"),
        # Sizes.
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"q_lora_rank": ...}, "q_lora_rank is missing"),
        ({"kv_lora_rank": -1}, "kv_lora_rank should be greater than or equal to 0, got -1"),
        ({"vocab_size": "512"}, "vocab_size should be a valid integer, got '512'"),
        ({"num_hidden_layers": True}, "num_hidden_layers should be a valid integer, got True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps should be"),
        ({"torch_dtype": "int8"}, "torch_dtype should be 'bfloat16', 'float16' or 'float32', got 'int8'"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace is 4, but there are only 3 layers"),
        ({"eos_token_id": 512}, "eos_token_id (512) must lie below vocab_size (512)"),
        ({"eos_token_id": [1, 600]}, "eos_token_id (600) must lie below vocab_size (512)"),
        ({"eos_token_id": "end"}, "eos_token_id should be a valid integer, got 'end'"),
        # Experts and gates.
        ({"n_routed_experts": 10}, "n_routed_experts (10) does not divide into n_group (4) equal groups"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but a token can choose among 4 experts only"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be greater than 0 where there are experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be greater than 0 where there are experts"),
        ({"topk_group": 5}, "topk_group is 5, but n_group is only 4"),
        ({"n_group": 8}, "n_group is 8 for 8 experts, but noaux_tc scores a group by its two best experts"),
        ({"topk_method": "greedy"}, "are greedy with sigmoid, but deepseek_v3 has noaux_tc with sigmoid"),
        ({"scoring_func": "softmax"}, "are noaux_tc with softmax, but deepseek_v3 has noaux_tc with sigmoid"),
        ({"topk_method": "best"}, "topk_method should be 'noaux_tc', 'greedy' or 'group_limited_greedy', got 'best'"),
    ],
)
def test_every_mistake_has_its_sentence(changes: dict[str, Any], sentence: str) -> None:
    message = complaint(changes)
    assert sentence in message
    assert "the configuration has a problem:" in message  # this one and no other


def test_mistakes_of_v2() -> None:
    assert "are noaux_tc with sigmoid, but deepseek_v2 has greedy with softmax or group_limited_greedy" in complaint(
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}, "deepseek-v2"
    )
    assert "norm_topk_prob is true" in complaint({"norm_topk_prob": True}, "deepseek-v2-lite")
    # Greedy choice knows no groups, so they do not limit it.
    lite = preset("deepseek-v2-lite").replace(n_group=32, topk_group=1)
    assert lite.num_experts_per_tok > lite.n_routed_experts // lite.n_group * lite.topk_group


def test_all_mistakes_are_told_at_once() -> None:
    message = complaint(
        {
            "hidden_act": "gelu",  # found while reading the spelling
            "kv_lora_rank": ...,  # found field by field
            "vocab_size": 0,
            "qk_rope_head_dim": 7,  # found between sound fields, although others are broken
            "topk_group": 5,
            "index_topk": 3,
            "rope_scaling": YARN | {"mscale": 0.7},
        }
    )
    assert "the configuration has 7 problems:" in message
    for key in ("hidden_act", "kv_lora_rank", "vocab_size", "qk_rope_head_dim", "topk_group", "index_topk", "mscale"):
        assert f"\n  - {key} " in message or f"\n  - rope_scaling.{key} " in message


def test_fields_given_directly_are_checked_as_well() -> None:
    with pytest.raises(UserError, match=r"hidden_sise is unknown.*did you mean hidden_size"):
        preset("nano").replace(hidden_sise=3)
    with pytest.raises(UserError, match="dense, but first_k_dense_replace is 1"):
        preset("nano").replace(n_routed_experts=None)
    with pytest.raises(UserError, match="extra holds index_topk, not known to be harmless"):
        preset("nano").replace(extra={"index_topk": 1})
    with pytest.raises(UserError, match=r"rope_scaling\.low is unknown"):
        preset("nano").replace(rope_scaling=YARN | {"low": 1})


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"{'hidden_size': 64}", "is not JSON. Got: Expecting property name"),
        (b'{"hidden_size": 64', "is not JSON"),
        (b'{"hidden_size": ' + b"[" * 100_000, "is not JSON"),
        (b'{"hidden_size": ' + b"9" * 5_000 + b"}", "is not JSON"),
        (b"\xff\xfe{}", "is not text in UTF-8. Got: invalid start byte at byte 0"),
        (b"[1, 2]", "is not a JSON object. Got: list"),
        (b"{}", "config.json has 19 problems:"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        ModelConfig.read(tmp_path)
    assert sentence in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no .*config\.json"):
        ModelConfig.read(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        ModelConfig.read(tmp_path)


@pytest.mark.parametrize("typo, meant", [("deepseekv3", "deepseek-v3"), ("Kimi-K2-Instruct", "kimi-k2")])
def test_an_unknown_preset_names_the_closest(typo: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        preset(typo)
    assert caught.value.do == f"did you mean {meant}?"
    assert all(name in str(caught.value) for name in preset_names())
