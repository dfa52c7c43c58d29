"""transformers' DeepSeek models, given the same weights: a witness beside the restatement.

It departs from the reports in two places, and there the restatement alone is the judge:

* With `mscale_all_dim` 0 it ignores `mscale` on cos and sin (and takes 1).
* Earlier releases masked the experts outside the kept groups with 0.0 instead of -inf, so that negative routing biases
  went astray; the pinned one does not, and `test_parity.py` shows what that costs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from cavelight.spec.config import ModelConfig

Weights = dict[str, Tensor]


def stack_experts(weights: Weights, prefix: str) -> Weights:
    """transformers holds the experts of a layer in two tensors: gate above up [E, 2F, D], and down [E, D, F]."""
    experts = {name.split(".")[-3] for name in weights if name.startswith(f"{prefix}.experts.")}
    each = [f"{prefix}.experts.{expert}" for expert in sorted(experts, key=int)]
    return {
        f"{prefix}.experts.gate_up_proj": torch.stack(
            [torch.cat([weights[f"{name}.gate_proj.weight"], weights[f"{name}.up_proj.weight"]]) for name in each]
        ),
        f"{prefix}.experts.down_proj": torch.stack([weights[f"{name}.down_proj.weight"] for name in each]),
    }


def stacked(weights: Weights) -> Weights:
    """The same weights with every layer's experts stacked."""
    layers = {name.split(".experts.")[0] for name in weights if ".mlp.experts." in name}
    kept = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for prefix in sorted(layers):
        kept |= stack_experts(weights, prefix)
    return kept


def of_layer(name: str) -> int:
    """The layer a tensor belongs to; -1 outside the layers."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def witness(config: ModelConfig, weights: Weights) -> DeepseekV3ForCausalLM | DeepseekV2ForCausalLM:
    """transformers' model of this configuration, eager attention, strictly loaded with the main model's weights."""
    kinds = {
        "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
        "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    }
    config_class, model_class = kinds[config.model_type]
    model = model_class._from_config(config_class(**config.to_hf()), attn_implementation="eager").eval()
    main = {name: tensor for name, tensor in weights.items() if of_layer(name) < config.num_hidden_layers}
    model.load_state_dict(stacked(main), strict=True)
    return model


def witness_logits(
    config: ModelConfig, weights: Weights, tokens_T: Sequence[int], positions_T: Sequence[int]
) -> Tensor:
    """Logits [T, V] of one sequence. A mask is given, or positions with gaps would be taken for packed documents."""
    tokens_1T = torch.tensor([list(tokens_T)])
    with torch.no_grad():
        output = witness(config, weights)(
            tokens_1T,
            attention_mask=torch.ones_like(tokens_1T),
            position_ids=torch.tensor([list(positions_T)]),
            use_cache=False,
        )
    return output.logits[0]


def load_predictors(main: DeepseekV3ForCausalLM, config: ModelConfig, weights: Weights) -> MtpModel:
    """transformers' MTP modules, which take hidden states after the norm (`mtp_hidden` post_norm)."""
    model = MtpModel(main, config.num_nextn_predict_layers).eval()
    own = {}
    for name, tensor in stacked(weights).items():
        depth = of_layer(name) - config.num_hidden_layers
        if depth < 0 or name.endswith(("embed_tokens.weight", "shared_head.head.weight")):
            continue
        part = name.split(".", 3)[3]
        if part.split(".")[0] in ("enorm", "hnorm", "eh_proj"):
            own[f"layers.{depth}.{part}"] = tensor
        elif part == "shared_head.norm.weight":
            own[f"layers.{depth}.post_norm.weight"] = tensor
        else:
            own[f"layers.{depth}.mtp_block.{part}"] = tensor
    missing, unexpected = model.load_state_dict(own, strict=False)
    shared = ("embed_tokens.", "shared_head.", "rotary_emb.")
    left = [name for name in missing if not name.startswith(shared)] + unexpected
    if left:
        raise AssertionError(f"transformers' MTP weights do not fit: {left}")
    return model


def witness_chain_logits(config: ModelConfig, weights: Weights, tokens_T: Sequence[int]) -> list[Tensor]:
    """Logits of the MTP modules, module k [T-k, V], on one sequence from position 0."""
    tokens = torch.tensor([list(tokens_T)])
    main = witness(config, weights)
    logits = []
    with torch.no_grad():
        hidden = main.model(tokens, use_cache=False).last_hidden_state
        predictors = load_predictors(main, config, weights)
        for depth in range(1, config.num_nextn_predict_layers + 1):
            left = len(tokens_T) - depth
            hidden = predictors.forward_layer(
                depth - 1, hidden[:, :left], torch.arange(left)[None], None, input_ids=tokens[:, depth:]
            )
            logits.append(main.lm_head(hidden)[0])
    return logits
