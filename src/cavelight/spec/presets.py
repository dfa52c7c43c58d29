"""Configurations by name: the released models, and four of our own for one machine."""

from difflib import get_close_matches
from typing import Any

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig, Yarn

_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_scaling": Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_V2: dict[str, Any] = {
    **_V3,
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "num_nextn_predict_layers": 0,
    "rope_scaling": Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

_V2_LITE: dict[str, Any] = {
    **_V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}

_MOONLIGHT: dict[str, Any] = {
    **_V2_LITE,
    "model_type": "deepseek_v3",
    "vocab_size": 163840,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
}

_KIMI_K2: dict[str, Any] = {
    **_V3,
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "rope_theta": 50000.0,
    "rope_scaling": Yarn(
        factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0
    ),
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "extra": {"model_type": "kimi_k2"},
}

# Ours: V3 in everything but size. pad_token_id stays unset, as flat tokens know no padding.
_NANO: dict[str, Any] = {
    **_V3,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_scaling": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}

_DEMO: dict[str, Any] = {
    **_NANO,
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

_SMALL: dict[str, Any] = {
    **_DEMO,
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 192,
}

# Large enough for reading weights to take the time, small enough for any machine: what speeds are measured on.
_MID: dict[str, Any] = {
    **_SMALL,
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "max_position_embeddings": 32768,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 512,
    "n_group": 1,
    "topk_group": 1,
}

_PRESETS = {
    "deepseek-v3": _V3,
    "deepseek-v2": _V2,
    "deepseek-v2-lite": _V2_LITE,
    "moonlight-16b-a3b": _MOONLIGHT,
    "kimi-k2": _KIMI_K2,
    "mid": _MID,
    "small": _SMALL,
    "demo": _DEMO,
    "nano": _NANO,
}


def preset_names() -> tuple[str, ...]:
    """All names that `preset` knows: the released models first, then ours by size."""
    return tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The configuration of that name. Raises UserError that lists the names and the closest one."""
    if name not in _PRESETS:
        close = get_close_matches(name.lower(), _PRESETS, n=1, cutoff=0.4)
        raise UserError(
            f"There is no preset {name!r}",
            why=f"the presets are {', '.join(_PRESETS)}",
            do=f"did you mean {close[0]}?" if close else "choose one of these, or give the path of a config.json",
        )
    return ModelConfig(**_PRESETS[name])
