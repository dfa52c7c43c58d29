"""What a model costs, counted from the table of parameters: elements, bytes, floating-point operations, cache.

Counts hold every stored number, the routing biases (`e_score_correction_bias`) too: only with them do they equal the
671,026,419,200 elements of DeepSeek-V3's checkpoint. A multiply-add is two operations. Letters are those of shapes.py.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import FP8, INT4, INT8, PACKED_ROLES, PLAIN
from cavelight.spec.shapes import Parameter, parameters

Form = Literal["expanded", "absorbed"]
Precision = Literal["bf16", "fp8", "int8", "int4"]

FORMATS = {"bf16": PLAIN, "fp8": FP8, "int8": INT8, "int4": INT4}


def total_parameters(config: ModelConfig, mtp: bool = False) -> int:
    """Elements of the model, without or with its prediction modules (V3: 671,026,419,200 without)."""
    return sum(p.size for p in _table(config, mtp))


def mtp_parameters(config: ModelConfig) -> int:
    """Elements that the prediction modules add; embedding and head are the trunk's (V3: 11,610,068,224)."""
    return total_parameters(config, mtp=True) - total_parameters(config)


def checkpoint_elements(config: ModelConfig) -> int:
    """Elements in a Hugging Face checkpoint: each prediction module carries copies of embedding and head there."""
    copies = 2 * config.vocab_size * config.hidden_size
    return total_parameters(config, mtp=True) + config.num_nextn_predict_layers * copies


def active_parameters(config: ModelConfig, embedding: bool = True, mtp: bool = False) -> int:
    """Elements that one token meets: K of the E experts, and all the rest.

    Of the embedding a token reads a single row, so it is counted or not (V3: 37.55 or 36.63 billion); the head always.
    """
    return sum(_active_elements(config, p) for p in _table(config, mtp) if embedding or p.role != "embedding")


def weight_bytes(config: ModelConfig, precision: Precision = "bf16", mtp: bool = True) -> int:
    """Bytes of the weights as a checkpoint of this precision holds them, MTP's copies not counted.

    `bf16` is two bytes each, routing biases four. The others pack the matrices of spec.formats.PACKED_ROLES and keep
    scales beside them: `fp8` a byte each and one float32 per block of 128 x 128, `int8` and `int4` a byte or half of
    one and a bfloat16 per row or per 32 columns of it. A stack of experts or heads is packed matrix by matrix.
    """

    def stored(p: Parameter) -> int:
        if p.role in PACKED_ROLES:
            return FORMATS[precision].nbytes(p.shape)
        return p.size * (4 if p.dtype == "float32" else 2)

    return sum(stored(p) for p in _table(config, mtp))


def scale_count(p: Parameter) -> int:
    """Number of fp8 scales of one tensor: its last two axes in blocks of 128 x 128, ragged edges counted whole."""
    return prod(p.shape[:-2]) * prod(FP8.scale_shape((p.shape[-2], p.shape[-1])))


def flops_per_token(
    config: ModelConfig,
    past: int,
    *,
    queries: int = 1,
    form: Form = "absorbed",
    training: bool = False,
    mtp: bool = False,
    logits: float = 1.0,
) -> float:
    """Floating-point operations per token, when `queries` tokens go through together after `past` cached ones.

    Counted are matrix products; attention is causal, so a token sees past + (queries + 1) / 2 rows on average.
    `expanded` brings every latent it sees to keys and values once per pass (V3 report, equations 1-11), `absorbed`
    takes the queries to the latents instead. Plain attention has one form, counted without the products by zeros and
    ones with which model.gqa picks its heads. `training` adds the backward pass, twice the forward one; nothing is
    recomputed. With `mtp` the prediction modules run too, each with a use of the head. `logits`: the share of tokens
    for which the trunk uses its head; of a prompt that is the last one alone.
    """
    uses_of_head = logits + (config.num_nextn_predict_layers if mtp else 0)
    products = _layers(config, mtp) * _attention_products(config, past, queries, form)
    for p in _table(config, mtp):
        if p.role in ("embedding", "norm", "routing_bias") or p.name.endswith((".k_up", ".v_up")):
            continue  # looked up, no matrix, or counted with attention
        products += _active_elements(config, p) * (uses_of_head if p.role == "head" else 1)
    return (6 if training else 2) * products


def _attention_products(config: ModelConfig, past: int, queries: int, form: Form) -> float:
    """Multiply-adds per token of scores, mixing and the two up-projections in one layer."""
    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    U, C = config.v_head_dim, config.kv_lora_rank
    visible = past + (queries + 1) / 2
    if config.attention == "gqa":
        return H * visible * (R + U)
    if form == "absorbed":
        return H * (visible * (C + R + C) + (N + U) * C)
    expansions = (past + queries) / queries
    return H * (visible * (N + R + U) + expansions * (N + U) * C)


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Bytes that one token of context occupies, over all layers, by kind of attention.

    `mla` is what Cavelight stores, the latent and the rotary key. `expanded` is MLA cached as whole keys and values.
    The others are plain attention of the same shape, with keys as wide as qk_nope_head_dim: one key-value head per
    query head, eight of them (or as many as there are heads), or one (V2 report, table 1).
    """

    mla: int
    expanded: int
    mha: int
    gqa8: int
    mqa: int


def stored_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2, mtp: bool = False) -> int:
    """What our cache holds of one token of context: latents and rotary keys, or keys and values of plain attention."""
    return config.cache_width * _layers(config, mtp) * bytes_per_element


def cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2, mtp: bool = False) -> CacheSizes:
    """Cache bytes per token for MLA, if the model has it, and its alternatives; `mtp` counts MTP's layers too."""
    H, N, U = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    unit = _layers(config, mtp) * bytes_per_element
    return CacheSizes(
        mla=stored_bytes_per_token(config, bytes_per_element, mtp),
        expanded=H * (config.qk_head_dim + U) * unit,
        mha=H * (N + U) * unit,
        gqa8=min(8, H) * (N + U) * unit,
        mqa=(N + U) * unit,
    )


def _table(config: ModelConfig, mtp: bool) -> list[Parameter]:
    return [p for p in parameters(config) if mtp or not p.name.startswith("mtp.")]


def _layers(config: ModelConfig, mtp: bool) -> int:
    return config.num_layers_with_mtp if mtp else config.num_hidden_layers


def _active_elements(config: ModelConfig, p: Parameter) -> int:
    if p.role != "expert":
        return p.size
    return p.size // p.shape[0] * config.num_experts_per_tok
