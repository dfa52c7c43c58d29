"""What a layer keeps of each token for its backward pass, tensor by tensor. No torch.

As training on accelerators keeps it: attention in its expanded form by a kernel that stores the output and one number
a head (FlashAttention), each norm's statistics neglected. What our own engine keeps on a CPU is in here.py.
Letters: D hidden size, H heads, N / R / U widths of a head without position, rotary, of values; C and Q latent ranks,
I dense FFN width, E experts, K experts a token, F expert width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from cavelight.spec.config import ModelConfig
from cavelight.spec.sections import Recompute

Precision = Literal["bf16", "fp8"]

BF16, FLOAT32 = 16.0, 32.0
FP8 = 8 + 32 / 128  # bits an element: E4M3, and a float32 scale for each tile of 1 x 128 (V3 report, section 3.3.2)
E5M6 = 12 + 32 / 128  # what V3 keeps of attention's output (V3 report, section 3.3.3)


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor of a layer: elements a token, bits an element.

    `remade`: selective recomputation drops it and makes it again from the others: outputs of norms, the
    up-projections of MLA, the output of SwiGLU (V3 report, sections 3.2.3 and 3.3.3).
    """

    name: str
    elements: int
    bits: float
    remade: bool = False
    routed: bool = False  # counted for the tokens that a device's experts get

    @property
    def bytes(self) -> float:
        return self.elements * self.bits / 8


def layer_tensors(config: ModelConfig, layer: int, precision: Precision = "bf16") -> tuple[Kept, ...]:
    """All tensors that a layer keeps where nothing is recomputed; its input `x` comes first."""
    return (*_attention(config, precision), *_feed_forward(config, layer, precision))


def module_tensors(config: ModelConfig, precision: Precision = "bf16") -> tuple[Kept, ...]:
    """What a prediction module keeps besides its layer: its two inputs and, joined, their norms (eq. 21)."""
    D, linear = config.hidden_size, _linear(precision)
    return Kept("embedding", D, BF16), Kept("hidden state", D, BF16), Kept("both norms", 2 * D, linear, remade=True)


def kept_bytes(tensors: tuple[Kept, ...], recompute: Recompute) -> float:
    """Bytes a token from the forward to the backward pass; full recomputation keeps the layer's input alone."""
    if recompute == "full":
        return tensors[0].bytes
    return sum(t.bytes for t in tensors if not (t.remade and recompute == "selective"))


def remade_bytes(tensors: tuple[Kept, ...], recompute: Recompute) -> float:
    """Bytes a token that one layer's backward pass makes again before it begins."""
    return sum(t.bytes for t in tensors) - kept_bytes(tensors, recompute)


def busiest(tensors: tuple[Kept, ...], imbalance: float) -> tuple[Kept, ...]:
    """A layer's tensors where the experts get `imbalance` times the mean."""
    return tuple(replace(t, elements=ceil(t.elements * imbalance)) if t.routed else t for t in tensors)


def _linear(precision: Precision) -> float:
    """Bits of what goes into a matrix product, as it is kept for the weights' gradient."""
    return FP8 if precision == "fp8" else BF16


def _attention(config: ModelConfig, precision: Precision) -> Iterator[Kept]:
    """V3 report, eq. 1-11."""
    D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    N, R, U = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    linear, Q = _linear(precision), config.q_lora_rank
    yield Kept("x", D, BF16)
    yield Kept("norm of x", D, linear, remade=True)
    if Q is not None:
        yield Kept("query latent", Q, BF16)
        yield Kept("norm of query latent", Q, linear, remade=True)
    yield Kept("queries", H * (N + R), BF16, remade=Q is not None)  # without compression no cheap up-projection
    yield Kept("latent and rotary key", C + R, BF16)
    yield Kept("norm of latent", C, linear, remade=True)
    yield Kept("keys", H * (N + R), BF16, remade=True)
    yield Kept("values", H * U, BF16, remade=True)
    yield Kept("attention's output", H * U, E5M6 if precision == "fp8" else BF16)
    yield Kept("attention's logsumexp", H, FLOAT32)


def _feed_forward(config: ModelConfig, layer: int, precision: Precision) -> Iterator[Kept]:
    """SwiGLU, once or by way of the experts (V3 report, eq. 12-16); each token has K copies there."""
    D, K, F = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
    linear = _linear(precision)
    yield Kept("x after attention", D, BF16)
    yield Kept("norm of x after attention", D, linear, remade=True)
    if not config.is_moe(layer):
        yield from _swiglu("dense", config.intermediate_size, linear)
        return
    yield Kept("scores", config.n_routed_experts or 0, FLOAT32)
    yield Kept("dispatched x", K * D, linear, routed=True)
    yield from _swiglu("experts", K * F, linear, routed=True)
    # For the gradient of the weights of the sum; remade, or had from SwiGLU's output instead.
    yield Kept("experts' output", K * D, BF16, remade=True, routed=True)
    if config.n_shared_experts:
        yield from _swiglu("shared experts", config.n_shared_experts * F, linear)


def _swiglu(name: str, width: int, linear: float, routed: bool = False) -> Iterator[Kept]:
    yield Kept(f"{name}: gate and up", 2 * width, linear, routed=routed)
    yield Kept(f"{name}: silu(gate) * up", width, linear, remade=True, routed=routed)
