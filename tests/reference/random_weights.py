"""Random weights under Hugging Face names, chosen so that every part of a tiny model makes a visible difference."""

import torch
from torch import Tensor

from cavelight.spec.config import ModelConfig


class Maker:
    """Draws one named tensor after another from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.weights: dict[str, Tensor] = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, outputs: int, inputs: int, std: float | None = None) -> None:
        """About one unit out for one unit in, so that no branch drowns another, unless told otherwise."""
        std = std or min(max(inputs**-0.5, 0.05), 0.2)
        self.weights[f"{name}.weight"] = (self.normal(outputs, inputs) * std).to(self.dtype)

    def norm(self, name: str, width: int) -> None:
        """Around one but never one: a norm that is left out or taken twice must show."""
        self.weights[f"{name}.weight"] = (1 + 0.2 * self.normal(width)).to(self.dtype)

    def bias(self, name: str, width: int) -> None:
        """Routing biases centred on zero: about half are negative, some below -1."""
        self.weights[name] = (0.6 * self.normal(width)).to(self.dtype)

    def feed_forward(self, name: str, hidden: int, width: int) -> None:
        self.linear(f"{name}.gate_proj", width, hidden)
        self.linear(f"{name}.up_proj", width, hidden)
        self.linear(f"{name}.down_proj", hidden, width)

    def attention(self, name: str, config: ModelConfig) -> None:
        hidden, heads = config.hidden_size, config.num_attention_heads
        queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.linear(f"{name}.q_proj", queries, hidden)
        else:
            self.linear(f"{name}.q_a_proj", config.q_lora_rank, hidden)
            self.norm(f"{name}.q_a_layernorm", config.q_lora_rank)
            self.linear(f"{name}.q_b_proj", queries, config.q_lora_rank)
        self.linear(f"{name}.kv_a_proj_with_mqa", config.kv_lora_rank + config.qk_rope_head_dim, hidden)
        self.norm(f"{name}.kv_a_layernorm", config.kv_lora_rank)
        self.linear(f"{name}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.linear(f"{name}.o_proj", hidden, heads * config.v_head_dim)

    def layer(self, name: str, config: ModelConfig, moe: bool) -> None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.norm(f"{name}.input_layernorm", hidden)
        self.attention(f"{name}.self_attn", config)
        self.norm(f"{name}.post_attention_layernorm", hidden)
        if not moe:
            self.feed_forward(f"{name}.mlp", hidden, config.intermediate_size)
            return
        self.linear(f"{name}.mlp.gate", config.n_routed_experts, hidden)
        if config.topk_method == "noaux_tc":
            self.bias(f"{name}.mlp.gate.e_score_correction_bias", config.n_routed_experts)
        for expert in range(config.n_routed_experts):
            self.feed_forward(f"{name}.mlp.experts.{expert}", hidden, width)
        if config.n_shared_experts:
            self.feed_forward(f"{name}.mlp.shared_experts", hidden, width * config.n_shared_experts)


def random_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of such a checkpoint; the MTP layers bring their copies of embedding and head."""
    make, hidden, vocabulary = Maker(seed, dtype), config.hidden_size, config.vocab_size
    make.linear("model.embed_tokens", vocabulary, hidden)
    make.linear("lm_head", vocabulary, hidden, std=0.05)
    make.norm("model.norm", hidden)
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        make.layer(f"model.layers.{layer}", config, moe=config.is_moe(layer))
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        name = f"model.layers.{layer}"
        make.norm(f"{name}.enorm", hidden)
        make.norm(f"{name}.hnorm", hidden)
        make.linear(f"{name}.eh_proj", hidden, 2 * hidden)
        make.norm(f"{name}.shared_head.norm", hidden)
        make.weights[f"{name}.embed_tokens.weight"] = make.weights["model.embed_tokens.weight"].clone()
        make.weights[f"{name}.shared_head.head.weight"] = make.weights["lm_head.weight"].clone()
    return make.weights
