"""Configurations: what the released files say, both spellings of config.json, and round trips."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cavelight.spec.config import ModelConfig, Yarn
from cavelight.spec.presets import preset, preset_names

# What the released config.json files say, where it bears on the mathematics.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
    },
    "moonlight-16b-a3b": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "vocab_size": 163840,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "bos_token_id": 163584,
        "eos_token_id": 163586,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
    },
}
HARMLESS = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "ep_size": 1,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "transformers_version": "4.33.1",
    "use_cache": True,
}


def as_json(config: ModelConfig) -> dict[str, Any]:
    """What a program reads back after we wrote the configuration to a file."""
    raw: dict[str, Any] = json.loads(json.dumps(config.to_hf()))
    return raw


def modern(config: ModelConfig) -> dict[str, Any]:
    """The same configuration in the spelling of transformers 5."""
    raw = as_json(config)
    yarn = raw.pop("rope_scaling") or {"rope_type": "default"}
    yarn.pop("type", None)
    raw["rope_parameters"] = {**yarn, "rope_theta": raw.pop("rope_theta")}
    raw["dtype"] = raw.pop("torch_dtype")
    raw["head_dim"] = raw["qk_rope_head_dim"]
    raw["qk_head_dim"] = raw["qk_rope_head_dim"] + raw["qk_nope_head_dim"]
    for key in ("scoring_func", "moe_layer_freq", "topk_method"):
        if key != "topk_method" or config.topk_method in ("noaux_tc", "greedy"):
            del raw[key]
    return raw


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_hf(as_json(config)) == config
    assert ModelConfig.from_hf(as_json(config)).to_hf() == config.to_hf()


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_say_what_the_released_files_say(name: str) -> None:
    written = preset(name).to_hf()
    if written["rope_scaling"]:
        assert written["rope_scaling"].pop("rope_type") == "yarn"
    assert {key: written[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_files_are_read_and_harmless_keys_come_back(name: str) -> None:
    config = ModelConfig.from_hf(PUBLISHED[name] | HARMLESS)
    assert config.replace(extra={}) == preset(name)
    assert {key: config.to_hf()[key] for key in HARMLESS} == HARMLESS


@pytest.mark.parametrize("name", preset_names())
def test_both_spellings_mean_the_same(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_hf(modern(config)) == config
    both = as_json(config) | {key: modern(config)[key] for key in ("rope_parameters", "dtype")}
    assert ModelConfig.from_hf(both) == config


def test_kimi_k2_is_a_deepseek_v3_that_keeps_its_name() -> None:
    config = preset("kimi-k2")
    assert config.model_type == "deepseek_v3"
    assert config.to_hf()["model_type"] == "kimi_k2"
    assert config.to_hf()["architectures"] == ["DeepseekV3ForCausalLM"]


def test_properties() -> None:
    v3 = preset("deepseek-v3")
    assert (v3.qk_head_dim, v3.cache_width, v3.num_layers_with_mtp) == (192, 576, 62)
    assert [layer for layer in range(62) if not v3.is_moe(layer)] == [0, 1, 2]
    every_other = preset("nano").replace(num_hidden_layers=6, moe_layer_freq=2)
    assert [every_other.is_moe(layer) for layer in range(7)] == [False, False, True, False, True, False, True]


def test_a_dense_model() -> None:
    dense = ModelConfig.from_hf(as_json(preset("nano")) | {"n_routed_experts": None, "moe_intermediate_size": None})
    assert not any(dense.is_moe(layer) for layer in range(dense.num_layers_with_mtp))
    assert dense.first_k_dense_replace == dense.num_hidden_layers  # engines that ask no further build no experts
    assert ModelConfig.from_hf(as_json(dense)) == dense


def test_defaults_of_yarn_are_deepseeks() -> None:
    raw = as_json(preset("nano")) | {
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128}
    }
    assert ModelConfig.from_hf(raw).rope_scaling == Yarn(
        factor=4.0,
        original_max_position_embeddings=128,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=0.0,
    )


def test_mtp_hidden_is_written_only_where_it_differs_from_the_released_models() -> None:
    before = preset("nano").replace(mtp_hidden="pre_norm")
    assert before.to_hf()["mtp_hidden"] == "pre_norm"
    assert ModelConfig.from_hf(as_json(before)) == before
    assert "mtp_hidden" not in preset("nano").to_hf()


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        preset("nano").hidden_size = 128


def test_reading_files(tmp_path: Path) -> None:
    config = preset("nano")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    assert ModelConfig.read(tmp_path) == ModelConfig.read(str(tmp_path / "config.json")) == config


def test_configurations_need_no_torch() -> None:
    code = (
        "import sys; from cavelight.spec import cost, presets; from cavelight.plan import table;"
        "table.rows(table.facts(presets.preset('demo'))); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Any valid configuration ---------------------------------------------------------------------------------------------


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    v3 = draw(st.booleans())
    size = st.integers(1, 100_000)
    number = st.floats(1e-6, 1e6, allow_nan=False)
    layers = draw(st.integers(1, 100))
    groups = draw(st.integers(1, 8))
    per_group = draw(st.integers(2, 9))
    kept = draw(st.integers(1, groups))
    dense = draw(st.booleans())
    vocab = draw(st.integers(2, 200_000))
    token = st.integers(0, vocab - 1)
    yarn = st.builds(
        Yarn,
        factor=st.floats(1, 128),
        original_max_position_embeddings=size,
        beta_fast=st.floats(2, 64),
        beta_slow=st.floats(0.5, 2),
        mscale=number,
        mscale_all_dim=number,
    )
    return ModelConfig(
        model_type="deepseek_v3" if v3 else "deepseek_v2",
        vocab_size=vocab,
        hidden_size=draw(size),
        intermediate_size=draw(size),
        num_hidden_layers=layers,
        num_nextn_predict_layers=draw(st.integers(0, 3)),
        max_position_embeddings=draw(size),
        num_attention_heads=draw(size),
        q_lora_rank=draw(st.none() | size),
        kv_lora_rank=draw(size),
        qk_nope_head_dim=draw(size),
        qk_rope_head_dim=2 * draw(size),
        v_head_dim=draw(size),
        rms_norm_eps=draw(number),
        rope_theta=draw(st.floats(2, 1e7)),
        rope_scaling=draw(st.none() | yarn),
        n_routed_experts=None if dense else groups * per_group,
        n_shared_experts=draw(st.none() | size),
        num_experts_per_tok=draw(st.integers(1, kept * per_group)),
        moe_intermediate_size=draw(size),
        first_k_dense_replace=layers if dense else draw(st.integers(0, layers)),
        moe_layer_freq=draw(st.integers(1, 3)),
        n_group=groups,
        topk_group=kept,
        topk_method="noaux_tc" if v3 else draw(st.sampled_from(["greedy", "group_limited_greedy"])),
        scoring_func="sigmoid" if v3 else "softmax",
        norm_topk_prob=draw(st.booleans()) if v3 else False,
        routed_scaling_factor=draw(number),
        bos_token_id=draw(st.none() | token),
        eos_token_id=draw(st.none() | token | st.lists(token, min_size=1, max_size=3)),
        pad_token_id=draw(st.none() | token),
        initializer_range=draw(number),
        aux_loss_alpha=draw(number),
        seq_aux=draw(st.booleans()),
        torch_dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        mtp_hidden=draw(st.sampled_from(["post_norm", "pre_norm"])),
        extra=draw(st.sampled_from([{}, HARMLESS])),
    )


@settings(max_examples=100, deadline=None)
@given(configurations())
def test_any_configuration_round_trips_in_both_spellings(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(as_json(config)) == config
    if config.moe_layer_freq == 1:
        assert ModelConfig.from_hf(modern(config)) == config
