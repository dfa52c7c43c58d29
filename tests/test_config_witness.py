"""transformers as a witness: it reads the configurations we write as the same model, in either spelling."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cavelight.spec.config import ModelConfig, Yarn
from cavelight.spec.cost import total_parameters
from cavelight.spec.presets import preset, preset_names

YARN = Yarn(factor=4.0, original_max_position_embeddings=128, beta_fast=16.0, mscale=0.707, mscale_all_dim=0.707)
V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
}
TINY = {
    "v3": preset("nano"),
    "v3 with yarn": preset("nano").replace(rope_scaling=YARN, rope_theta=5e4),
    "v2": preset("nano").replace(**V2),
    "v2 with yarn, queries whole": preset("nano").replace(**V2, rope_scaling=YARN, q_lora_rank=None),
}
# Fields that transformers has under the same name. What it lacks, its model classes imply or do without.
SHARED = ModelConfig.model_fields.keys() - {
    "attention",
    "num_key_value_heads",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "mtp_hidden",
    "extra",
    "model_type",
}


def theirs(raw: dict[str, Any]) -> PretrainedConfig:
    raw = dict(raw)
    return AutoConfig.for_model(raw.pop("model_type"), **raw)


def known_to_transformers(config: ModelConfig) -> dict[str, Any]:
    """Our config.json, Kimi-K2's under the name that transformers has for it."""
    return config.to_hf() | {"model_type": config.model_type}


@pytest.mark.parametrize("name", preset_names())
def test_every_field_arrives(name: str) -> None:
    config = preset(name)
    read = theirs(known_to_transformers(config))
    assert {key: getattr(read, key) for key in SHARED} == {key: getattr(config, key) for key in SHARED}
    assert read.dtype == torch.bfloat16
    assert read.qk_head_dim == config.qk_head_dim
    assert read.num_key_value_heads == config.num_attention_heads
    rope = dict(read.rope_parameters)
    assert rope.pop("rope_theta") == config.rope_theta
    if config.rope_scaling is None:
        assert rope == {"rope_type": "default"}
    else:
        assert rope == {"type": "yarn", "rope_type": "yarn", **config.rope_scaling.model_dump()}


@pytest.mark.parametrize("name", preset_names())
def test_what_transformers_writes_is_read_as_the_same(name: str) -> None:
    config = preset(name).replace(extra={})
    written = theirs(known_to_transformers(config)).to_diff_dict()
    assert "rope_parameters" in written and "rope_scaling" not in written
    for key in ("scoring_func", "topk_method", "moe_layer_freq"):
        if key != "topk_method" or config.topk_method in ("noaux_tc", "greedy"):
            written.pop(key)  # as in a file that transformers wrote for a model of its own
    assert ModelConfig.from_hf(written).replace(extra={}) == config


@pytest.mark.parametrize("name", TINY)
def test_both_spellings_build_the_same_model(name: str) -> None:
    """Rotary frequencies, their factor and the softmax scale are equal to the bit, and YaRN does change them."""
    classic = theirs(TINY[name].to_hf())
    modern = theirs({k: v for k, v in classic.to_diff_dict().items() if k not in ("rope_scaling", "rope_theta")})
    models = [AutoModelForCausalLM.from_config(read).model for read in (classic, modern)]
    (a, b), (a_rotary, b_rotary) = models, [model.rotary_emb for model in models]
    assert torch.equal(a_rotary.inv_freq, b_rotary.inv_freq)
    assert a_rotary.attention_scaling == b_rotary.attention_scaling == 1
    assert a.layers[0].self_attn.scaling == b.layers[0].self_attn.scaling
    plain = TINY[name].qk_head_dim ** -0.5
    assert (a.layers[0].self_attn.scaling != plain) == (TINY[name].rope_scaling is not None)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "moonlight-16b-a3b", "nano"])
def test_the_model_that_transformers_builds_has_as_many_elements(name: str) -> None:
    config = preset(name).replace(num_nextn_predict_layers=0)  # it builds prediction modules only when asked
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs(config.to_hf()))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == total_parameters(config)
