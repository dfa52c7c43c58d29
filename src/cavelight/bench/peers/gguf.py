"""A model as the file that llama.cpp opens, to measure it there: the trunk's weights to the bit, and no vocabulary.

  ours (model.layers.{i}.)                           theirs (blk.{i}.)
  self_attn.k_up  [H, N, C]                          attn_k_b  [H, C, N], as queries meet it
  self_attn.v_up  [H, U, C]                          attn_v_b
  mlp.experts.gate_proj  [E, F, D] (also up, down)   ffn_gate_exps
  mlp.gate.weight, e_score_correction_bias           ffn_gate_inp, exp_probs_b, both in float32, as are norms

Both rotate adjacent pairs. Prediction modules stay out: llama.cpp does not run those of this architecture.

Letters: H heads, N width without position, U value width, C latent width, E experts, F expert width, D hidden size.
"""

import math
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.model.router import is_group_limited
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig, Yarn
from cavelight.weights.files import bytes_of

ARCHITECTURE = "deepseek2"  # V3 is one too
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.k_up": "attn_k_b.weight",
    "self_attn.v_up": "attn_v_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{f"mlp.experts.{part}_proj": f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
}
LITE = (26, 27)  # layers of models that llama.cpp takes to have no latent queries, whatever their file says


def check_package() -> None:
    """Raises UserError unless the package that writes such files is here."""
    if find_spec("gguf") is None:
        raise UserError(
            "llama.cpp opens GGUF files, and the package that writes them is missing",
            got="no module named gguf",
            do="pip install 'gguf>=0.19', or leave --against out",
        )


def check_known(config: ModelConfig) -> None:
    """Raises UserError for a model that llama.cpp's `deepseek2` would compute otherwise, or not at all."""
    dense = [config.is_moe(layer) for layer in range(config.num_hidden_layers)].count(False)
    moe = dense < config.num_hidden_layers
    problem = ""
    if any(config.is_moe(layer) != (layer >= dense) for layer in range(config.num_hidden_layers)):
        problem = "dense layers after layers with experts"
    elif moe and config.n_shared_experts is None:
        problem = "experts without shared ones"
    elif moe and is_limited(config) and config.topk_method == "group_limited_greedy":
        problem = "groups of experts chosen by the best one of each, where it takes the sum of two"
    elif config.q_lora_rank is not None and config.num_hidden_layers in LITE:
        problem = f"latent queries in {config.num_hidden_layers} layers, which it takes for a V2-Lite without them"
    if problem:
        raise UserError(
            "llama.cpp would not compute this model", got=problem, do="leave --against out, or name another peer"
        )


def is_limited(config: ModelConfig) -> bool:
    """Whether some groups of experts are closed to a token; where all are open, there might as well be none."""
    return is_group_limited(config) and config.topk_group < config.n_group


@torch.no_grad()
def write_gguf(model: Transformer, path: Path) -> None:
    """Write a model with plain weights, in the numbers that it has; a tensor of it is copied at a time.

    Raises UserError for a model that llama.cpp does not know, and when the disk is full.
    """
    check_package()
    check_known(model.config)
    gguf = import_module("gguf")
    with file_beside(path) as scratch:
        writer = gguf.GGUFWriter(scratch, ARCHITECTURE)
        _describe(writer, gguf, model.config, model.lm_head.weight.dtype)
        for name, tensor in tensors(model):
            kind = "BF16" if tensor.dtype == torch.bfloat16 else "F32"
            shape, nbytes = tuple(tensor.shape), tensor.nbytes
            writer.add_tensor_info(name, shape, "float32", nbytes, getattr(gguf.GGMLQuantizationType, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in tensors(model):
            writer.write_tensor_data(_as_bytes(tensor))
        writer.close()


def tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The trunk's by llama.cpp's names; of bfloat16 ones those that it wants in float32 are that."""
    for name, tensor in model.state_dict().items():
        if name.startswith("mtp."):
            continue
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        theirs = f"blk.{found[1]}.{INSIDE[found[2]]}" if found else OUTSIDE[name]
        if theirs.endswith("attn_k_b.weight"):
            tensor = tensor.transpose(1, 2)
        yield theirs, tensor.float() if tensor.ndim == 1 or theirs.endswith("ffn_gate_inp.weight") else tensor


def _as_bytes(tensor: Tensor) -> Any:
    return import_module("numpy").frombuffer(bytes_of(tensor.contiguous()), dtype="uint8")


def _describe(writer: Any, gguf: Any, config: ModelConfig, dtype: torch.dtype) -> None:
    """What llama.cpp has to know of a model beside its weights."""
    kinds = gguf.LlamaFileType
    writer.add_name(f"{config.num_hidden_layers} layers of {config.hidden_size}")
    writer.add_file_type(kinds.MOSTLY_BF16 if dtype == torch.bfloat16 else kinds.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Attention is absorbed there: all heads look at one key, latent and rotary part, and one value, the latent.
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    _describe_rope(writer, gguf, config)
    _describe_experts(writer, gguf, config)


def _describe_rope(writer: Any, gguf: Any, config: ModelConfig) -> None:
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    yarn = config.rope_scaling
    if yarn is None or yarn.factor == 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
    turned, multiplier = scales(yarn)
    if turned != 1:
        writer.add_rope_scaling_attn_factors(turned)
    writer.add_rope_scaling_yarn_log_mul(0.1 * multiplier)  # its reader of this architecture takes the 0.1 out again


def scales(yarn: Yarn) -> tuple[float, float]:
    """The factor a of llama.cpp, and its multiplier x.

    It scales cos and sin by a and the softmax by (a m(x))^2, with m(s) = 0.1 s ln(factor) + 1; `Yarn` says what is
    wanted of both. Without x, or with 0, it would take another a.
    """
    log = 0.1 * math.log(yarn.factor)
    wanted, softmax = (yarn.mscale * log + 1) / (yarn.mscale_all_dim * log + 1), yarn.mscale_all_dim * log + 1
    if yarn.mscale == yarn.mscale_all_dim:
        return 1.0, yarn.mscale_all_dim
    return wanted, (softmax / wanted - 1) / log or 1e-9


def _describe_experts(writer: Any, gguf: Any, config: ModelConfig) -> None:
    dense = [config.is_moe(layer) for layer in range(config.num_hidden_layers)].count(False)
    writer.add_leading_dense_block_count(dense)
    if dense == config.num_hidden_layers:  # both are asked for all the same
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_shared_count(0)
        return
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    kinds = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kinds.SIGMOID if config.scoring_func == "sigmoid" else kinds.SOFTMAX)
    if is_limited(config):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
