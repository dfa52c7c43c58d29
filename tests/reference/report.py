"""The forward pass of the DeepSeek-V3 report (sections 2.1 and 2.2) and the gates of the V2 report, stated plainly.

T tokens (flat; `documents_T` says which document each belongs to), D hidden size, H heads, N content and R rotary width
of a query or key head, U value head width, C latent width, E routed experts, K experts per token, V vocabulary.
Weights are a dict under Hugging Face names, [out, in], without biases.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.spec.config import ModelConfig

Weights = dict[str, Tensor]

# The norms of both latents: 1e-6 whatever `rms_norm_eps` says, as in DeepSeek's own code and in transformers.
LATENT_EPS = 1e-6


@dataclass(frozen=True)
class Routing:
    """What one MoE layer chose: experts and weights of each token, and the scores s without bias."""

    ids_TK: list[list[int]]
    weights_TK: Tensor
    scores_TE: Tensor


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return weight_D * x_D / torch.sqrt((x_D * x_D).mean() + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


# Rotary position embedding and YaRN


def yarn_m(factor: float, mscale: float) -> float:
    """YaRN's attention factor: 0.1 * mscale * ln(factor) + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_frequencies(config: ModelConfig) -> list[float]:
    """Radians per position of the R/2 rotary pairs, after YaRN's interpolation of the slow ones."""
    width, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    if yarn is None:
        return frequencies

    def pair_that_turns(rotations: float) -> float:
        """Index of the pair that turns so many times within the original context."""
        length = yarn.original_max_position_embeddings
        return width * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    span = high - low if high != low else 0.001
    ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(width // 2)]
    return [f * (1 - r) + f / yarn.factor * r for f, r in zip(frequencies, ramp, strict=True)]


def rotary_length(config: ModelConfig) -> float:
    """YaRN's first scale: the factor on cos and sin, m(mscale) / m(mscale_all_dim)."""
    yarn = config.rope_scaling
    return 1.0 if yarn is None else yarn_m(yarn.factor, yarn.mscale) / yarn_m(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """(N+R)^-1/2, times YaRN's second scale m(mscale_all_dim)^2 whenever `rope_scaling` is set."""
    yarn = config.rope_scaling
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    return scale if yarn is None else scale * yarn_m(yarn.factor, yarn.mscale_all_dim) ** 2


def rotate(x_R: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... as complex numbers, each by its frequency times the position.

    `x_R` is one vector or one a head, [R] or [H, R].
    """
    frequencies = torch.tensor(rotary_frequencies(config), dtype=torch.float64).to(x_R.dtype)
    angles = position * frequencies
    turn = rotary_length(config) * torch.complex(torch.cos(angles), torch.sin(angles))
    turned = torch.complex(x_R[..., 0::2], x_R[..., 1::2]) * turn
    return torch.stack([turned.real, turned.imag], dim=-1).flatten(-2)


# Multi-head latent attention, V3 report equations 1 to 11


def query(weights: Weights, config: ModelConfig, prefix: str, x_D: Tensor) -> Tensor:
    """One token's queries [H, N+R], before rotation."""
    if config.q_lora_rank is None:
        q = weights[f"{prefix}.q_proj.weight"] @ x_D
    else:
        c_q = weights[f"{prefix}.q_a_proj.weight"] @ x_D
        c_q = rms_norm(c_q, weights[f"{prefix}.q_a_layernorm.weight"], LATENT_EPS)
        q = weights[f"{prefix}.q_b_proj.weight"] @ c_q
    return q.view(config.num_attention_heads, -1)


def attention(
    weights: Weights,
    config: ModelConfig,
    prefix: str,
    x_TD: Tensor,
    positions_T: Sequence[int],
    documents_T: Sequence[int],
) -> Tensor:
    """MLA in its expanded form: every token's keys and values are made anew for every head."""
    heads, content = config.num_attention_heads, config.qk_nope_head_dim
    keys_content, values, keys_rotary = [], [], []
    for x_D, position in zip(x_TD, positions_T, strict=True):
        compressed = weights[f"{prefix}.kv_a_proj_with_mqa.weight"] @ x_D
        c_C = rms_norm(compressed[: config.kv_lora_rank], weights[f"{prefix}.kv_a_layernorm.weight"], LATENT_EPS)
        expanded = (weights[f"{prefix}.kv_b_proj.weight"] @ c_C).view(heads, -1)
        keys_content.append(expanded[:, :content])
        values.append(expanded[:, content:])
        keys_rotary.append(rotate(compressed[config.kv_lora_rank :], position, config))
    k_THN, v_THU, k_rope_TR = torch.stack(keys_content), torch.stack(values), torch.stack(keys_rotary)

    outputs = []
    for t, x_D in enumerate(x_TD):
        q = query(weights, config, prefix, x_D)
        q_content, q_rotary = q[:, :content], rotate(q[:, content:], positions_T[t], config)
        seen = [s for s in range(t + 1) if documents_T[s] == documents_T[t]]
        mixed = []
        for h in range(heads):
            scores = (k_THN[seen, h] @ q_content[h] + k_rope_TR[seen] @ q_rotary[h]) * softmax_scale(config)
            share = torch.exp(scores - scores.max())
            mixed.append((share / share.sum()) @ v_THU[seen, h])
        outputs.append(weights[f"{prefix}.o_proj.weight"] @ torch.cat(mixed))
    return torch.stack(outputs)


# DeepSeekMoE, V3 report equations 12 to 16 and the gates of V2


def largest(values: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` largest values; of equal ones the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def limit_to_groups(choice: list[float], config: ModelConfig, masked: float = -math.inf) -> list[float]:
    """Keep the experts of the `topk_group` best groups, and put `masked` in the place of all others.

    A group is worth the sum of its two best biased scores in V3 (`noaux_tc`), its best score in V2.
    """
    size = len(choice) // config.n_group
    groups = [choice[g * size : (g + 1) * size] for g in range(config.n_group)]
    best = 2 if config.topk_method == "noaux_tc" else 1
    worth = [sum(sorted(group, reverse=True)[:best]) for group in groups]
    kept = largest(worth, config.topk_group)
    return [score if e // size in kept else masked for e, score in enumerate(choice)]


def gate(
    weights: Weights, config: ModelConfig, prefix: str, x_D: Tensor, masked: float = -math.inf
) -> tuple[list[int], Tensor, Tensor]:
    """One token's experts [K], their weights [K], and the scores of all experts [E] without bias.

    The bias and the limit to groups decide which experts are chosen; the weights come from the plain scores, and are
    scaled whether normalised or not. (Normalised weights in V2 are refused by the configuration: sources disagree.)
    """
    logits_E = weights[f"{prefix}.gate.weight"] @ x_D
    if config.scoring_func == "sigmoid":
        scores_E = 1 / (1 + torch.exp(-logits_E))
    else:
        scores_E = torch.exp(logits_E - logits_E.max())
        scores_E = scores_E / scores_E.sum()

    if config.topk_method == "noaux_tc":
        choice = (scores_E + weights[f"{prefix}.gate.e_score_correction_bias"]).tolist()
    else:
        choice = scores_E.tolist()
    if config.topk_method != "greedy":
        choice = limit_to_groups(choice, config, masked)
    ids = largest(choice, config.num_experts_per_tok)

    chosen = scores_E[ids]
    if config.norm_topk_prob:
        chosen = chosen / (chosen.sum() + 1e-20)
    return ids, chosen * config.routed_scaling_factor, scores_E


def feed_forward(weights: Weights, prefix: str, x_D: Tensor) -> Tensor:
    """SwiGLU: down(silu(gate x) * up x)."""
    gated = silu(weights[f"{prefix}.gate_proj.weight"] @ x_D) * (weights[f"{prefix}.up_proj.weight"] @ x_D)
    return weights[f"{prefix}.down_proj.weight"] @ gated


def mixture(weights: Weights, config: ModelConfig, prefix: str, x_TD: Tensor) -> tuple[Tensor, Routing]:
    """Routed experts by weight, plus the shared ones (which no gate and no factor touches)."""
    outputs, routes = [], []
    for x_D in x_TD:
        ids, weights_K, scores_E = gate(weights, config, prefix, x_D)
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(ids, weights_K, strict=True):
            y_D = y_D + weight * feed_forward(weights, f"{prefix}.experts.{expert}", x_D)
        if config.n_shared_experts:
            y_D = y_D + feed_forward(weights, f"{prefix}.shared_experts", x_D)
        outputs.append(y_D)
        routes.append((ids, weights_K, scores_E))
    ids_TK, weights_TK, scores_TE = zip(*routes, strict=True)
    return torch.stack(outputs), Routing(list(ids_TK), torch.stack(weights_TK), torch.stack(scores_TE))


# The model


def is_moe(config: ModelConfig, layer: int) -> bool:
    """Whether a layer has experts; a model without routed experts has none anywhere."""
    if not config.n_routed_experts:
        return False
    return layer >= config.first_k_dense_replace and layer % config.moe_layer_freq == 0


def block(
    weights: Weights,
    config: ModelConfig,
    layer: int,
    x_TD: Tensor,
    positions_T: Sequence[int],
    documents_T: Sequence[int],
) -> tuple[Tensor, Routing | None]:
    """Pre-norm block: x += MLA(norm x); x += FFN(norm x)."""
    prefix, eps = f"model.layers.{layer}", config.rms_norm_eps
    normed = torch.stack([rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], eps) for x in x_TD])
    x_TD = x_TD + attention(weights, config, f"{prefix}.self_attn", normed, positions_T, documents_T)
    normed = torch.stack([rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], eps) for x in x_TD])
    if is_moe(config, layer):
        y_TD, routing = mixture(weights, config, f"{prefix}.mlp", normed)
        return x_TD + y_TD, routing
    return x_TD + torch.stack([feed_forward(weights, f"{prefix}.mlp", x) for x in normed]), None


def trunk(
    weights: Weights,
    config: ModelConfig,
    tokens_T: Sequence[int],
    positions_T: Sequence[int],
    documents_T: Sequence[int],
) -> tuple[Tensor, list[Routing]]:
    """Hidden states [T, D] of the main model before its final norm, and the routing of each MoE layer in turn."""
    x_TD, routings = weights["model.embed_tokens.weight"][list(tokens_T)], []
    for layer in range(config.num_hidden_layers):
        x_TD, routing = block(weights, config, layer, x_TD, positions_T, documents_T)
        routings += [routing] if routing else []
    return x_TD, routings


def norm_after(weights: Weights, config: ModelConfig, depth: int, x_D: Tensor) -> Tensor:
    """The norm before the output head: the model's own at depth 0, that of MTP module k at depth k."""
    layer = config.num_hidden_layers + depth - 1
    name = "model.norm.weight" if depth == 0 else f"model.layers.{layer}.shared_head.norm.weight"
    return rms_norm(x_D, weights[name], config.rms_norm_eps)


def head(weights: Weights, config: ModelConfig, depth: int, hidden_TD: Tensor) -> Tensor:
    """Logits [T, V] from the hidden states at a depth: 0 is the main model, k its k-th MTP module; one head for all."""
    return torch.stack([weights["lm_head.weight"] @ norm_after(weights, config, depth, h_D) for h_D in hidden_TD])


def predict_further(
    weights: Weights,
    config: ModelConfig,
    depth: int,
    hidden_TD: Tensor,
    tokens_T: Sequence[int],
    positions_T: Sequence[int],
    documents_T: Sequence[int],
) -> tuple[Tensor, Routing | None]:
    """MTP module k = `depth` (from 1), V3 report equations 21 and 22: h^k from h^(k-1) and t_(i+k), `tokens_T`.

    The report writes [hidden ; embedding] into the projection, the released weights expect [embedding ; hidden].
    With `mtp_hidden` post_norm, h^(k-1) has gone through the norm before its own output head first.
    """
    layer, eps = config.num_hidden_layers + depth - 1, config.rms_norm_eps
    prefix, inputs = f"model.layers.{layer}", []
    for h_D, token in zip(hidden_TD, tokens_T, strict=True):
        if config.mtp_hidden == "post_norm":
            h_D = norm_after(weights, config, depth - 1, h_D)
        embedding = rms_norm(weights["model.embed_tokens.weight"][token], weights[f"{prefix}.enorm.weight"], eps)
        hidden = rms_norm(h_D, weights[f"{prefix}.hnorm.weight"], eps)
        inputs.append(weights[f"{prefix}.eh_proj.weight"] @ torch.cat([embedding, hidden]))
    return block(weights, config, layer, torch.stack(inputs), positions_T, documents_T)


def all_logits(weights: Weights, config: ModelConfig, tokens_T: Sequence[int], positions_T: Sequence[int]) -> Tensor:
    """Main logits [T, V] of one sequence."""
    hidden_TD, _ = trunk(weights, config, tokens_T, positions_T, [0] * len(tokens_T))
    return head(weights, config, 0, hidden_TD)


def chain_logits(
    weights: Weights, config: ModelConfig, tokens_T: Sequence[int], positions_T: Sequence[int]
) -> list[Tensor]:
    """Logits of the main model [T, V] and of each MTP module k [T-k, V], one sequence.

    Module k sits at position i, reads t_(i+k) and predicts t_(i+k+1), so the last k positions have nothing to read.
    """
    hidden_TD, _ = trunk(weights, config, tokens_T, positions_T, [0] * len(tokens_T))
    logits = [head(weights, config, 0, hidden_TD)]
    for depth in range(1, config.num_nextn_predict_layers + 1):
        left = len(tokens_T) - depth
        hidden_TD, _ = predict_further(
            weights, config, depth, hidden_TD[:left], tokens_T[depth:], positions_T[:left], [0] * left
        )
        logits.append(head(weights, config, depth, hidden_TD))
    return logits
