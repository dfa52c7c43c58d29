"""The one table of parameters: every tensor of a model, with its name, named axes, role and kind of number.

Letters, as everywhere: V vocabulary, D hidden size, H heads, g key-value heads of plain attention, N / R content and
rotary width of a query-key head, U value width of a head, C and Q the latent ranks of key-values and queries, I dense
FFN width, E experts, F expert width. The model, sharding, quantisation, checkpoint names, costs and drawings all read
this table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from cavelight.spec.config import ModelConfig

Axes = tuple[str, ...]
Role = Literal[
    "embedding",
    "head",
    "norm",
    "attention",
    "dense",
    "gate",
    "routing_bias",
    "expert",
    "shared_expert",
    "mtp_projection",
]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor. `axes` name its dimensions, `dtype` is the model's, or float32 whatever the model's is.

    The role `routing_bias` is a buffer that balancing sets; all others are trained by gradient.
    """

    name: str
    axes: Axes
    shape: tuple[int, ...]
    role: Role
    dtype: Literal["model", "float32"] = "model"

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@lru_cache(maxsize=16)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter and buffer of the model, prediction modules included, each stored once, in module order."""
    sizes = axis_sizes(config)
    return tuple(
        Parameter(
            name, axes, tuple(sizes[axis] for axis in axes), role, "float32" if role == "routing_bias" else "model"
        )
        for name, axes, role in _rows(config)
    )


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Length of every axis that the table names."""
    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    U, C, D, F = config.v_head_dim, config.kv_lora_rank, config.hidden_size, config.moe_intermediate_size
    return {
        "V": config.vocab_size,
        "D": D,
        "2D": 2 * D,
        "H": H,
        "N": N,
        "U": U,
        "C": C,
        "C+R": C + R,
        "Q": config.q_lora_rank or 0,
        "H*(N+R)": H * (N + R),
        "H*U": H * U,
        "g*R": (config.num_key_value_heads or 0) * R,
        "g*U": (config.num_key_value_heads or 0) * U,
        "I": config.intermediate_size,
        "E": config.n_routed_experts or 0,
        "F": F,
        "F*n_shared": F * (config.n_shared_experts or 0),
    }


Row = tuple[str, Axes, Role]


def _rows(config: ModelConfig) -> Iterator[Row]:
    yield "model.embed_tokens.weight", ("V", "D"), "embedding"
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer, f"model.layers.{layer}")
    yield "model.norm.weight", ("D",), "norm"
    yield "lm_head.weight", ("V", "D"), "head"
    for module in range(config.num_nextn_predict_layers):
        yield f"mtp.{module}.enorm.weight", ("D",), "norm"
        yield f"mtp.{module}.hnorm.weight", ("D",), "norm"
        yield f"mtp.{module}.eh_proj.weight", ("D", "2D"), "mtp_projection"
        yield from _block(config, config.num_hidden_layers + module, f"mtp.{module}.block")
        yield f"mtp.{module}.norm.weight", ("D",), "norm"


def _block(config: ModelConfig, layer: int, at: str) -> Iterator[Row]:
    yield f"{at}.input_layernorm.weight", ("D",), "norm"
    yield from _attention(config, f"{at}.self_attn")
    yield f"{at}.post_attention_layernorm.weight", ("D",), "norm"
    if config.is_moe(layer):
        yield from _experts(config, f"{at}.mlp")
    else:
        yield from _ffn(f"{at}.mlp", "I", "dense")


def _attention(config: ModelConfig, at: str) -> Iterator[Row]:
    if config.attention == "gqa":  # names as Llama's; N is 0
        yield f"{at}.q_proj.weight", ("H*(N+R)", "D"), "attention"
        yield f"{at}.k_proj.weight", ("g*R", "D"), "attention"
        yield f"{at}.v_proj.weight", ("g*U", "D"), "attention"
        yield f"{at}.o_proj.weight", ("D", "H*U"), "attention"
        return
    if config.q_lora_rank is None:
        yield f"{at}.q_proj.weight", ("H*(N+R)", "D"), "attention"
    else:
        yield f"{at}.q_a_proj.weight", ("Q", "D"), "attention"
        yield f"{at}.q_a_layernorm.weight", ("Q",), "norm"
        yield f"{at}.q_b_proj.weight", ("H*(N+R)", "Q"), "attention"
    yield f"{at}.kv_a_proj_with_mqa.weight", ("C+R", "D"), "attention"
    yield f"{at}.kv_a_layernorm.weight", ("C",), "norm"
    # Together these are the checkpoint's kv_b_proj.weight, viewed [H, N+U, C] and split on axis 1.
    yield f"{at}.k_up", ("H", "N", "C"), "attention"
    yield f"{at}.v_up", ("H", "U", "C"), "attention"
    yield f"{at}.o_proj.weight", ("D", "H*U"), "attention"


def _experts(config: ModelConfig, at: str) -> Iterator[Row]:
    yield f"{at}.gate.weight", ("E", "D"), "gate"
    if config.topk_method == "noaux_tc":
        yield f"{at}.gate.e_score_correction_bias", ("E",), "routing_bias"
    yield f"{at}.experts.gate_proj", ("E", "F", "D"), "expert"
    yield f"{at}.experts.up_proj", ("E", "F", "D"), "expert"
    yield f"{at}.experts.down_proj", ("E", "D", "F"), "expert"
    if config.n_shared_experts is not None:
        yield from _ffn(f"{at}.shared_experts", "F*n_shared", "shared_expert")


def _ffn(at: str, width: str, role: Role) -> Iterator[Row]:
    yield f"{at}.gate_proj.weight", (width, "D"), role
    yield f"{at}.up_proj.weight", (width, "D"), role
    yield f"{at}.down_proj.weight", ("D", width), role
