"""A roofline estimate of prefill and decoding: each part takes the longer of its bytes and its operations.

Parts follow each other and nothing is taken to overlap: so counted, the sum meets what whole systems publish
(docs/results/planner.md). Letters: T tokens that a sequence runs through in a step, K experts a token, E experts.
"""

from dataclasses import dataclass

from cavelight.plan import traffic
from cavelight.plan.devices import Device
from cavelight.plan.layout import Layout
from cavelight.plan.memory import Cache, cache_row_bytes
from cavelight.plan.share import Form, Share, share
from cavelight.spec.config import ModelConfig

# What good kernels reach of a data sheet, on H800: FlashMLA 3000 of 3350 GB/s and 660 of 989 Tflop/s, DeepGEMM 1550 of
# 1979 Tflop/s (their READMEs). A measured device has its losses in its figures already.
BANDWIDTH, ATTENTION, MATRIX = 0.90, 0.67, 0.78


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches: bytes per second, and operations per second in matrix products and in attention."""

    bandwidth: float
    matrix: float
    attention: float

    @classmethod
    def of(cls, device: Device, form: Form) -> "Rates":
        plain: Form = "fp32" if form == "fp32" else "bf16"
        if device.measured:
            return cls(device.bandwidth, device.peak(form), device.peak(plain))
        return cls(device.bandwidth * BANDWIDTH, device.peak(form) * MATRIX, device.peak(plain) * ATTENTION)


@dataclass(frozen=True, slots=True)
class Decode:
    """A step of decoding on one device: seconds of its parts, and what comes of it.

    per_sequence: tokens a second that one user sees. per_device: tokens a second of all sequences, over all devices.
    """

    parts: dict[str, float]
    tokens_per_step: float
    per_sequence: float
    per_device: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def distinct_experts(config: ModelConfig, tokens: float) -> float:
    """Expected number of a layer's experts that so many tokens touch: E (1 - (1 - K/E)^tokens)."""
    E = config.n_routed_experts or 0
    return E * (1 - (1 - config.num_experts_per_tok / E) ** tokens) if E else 0.0


def decode(
    config: ModelConfig,
    device: Device,
    layout: Layout,
    *,
    context: int,
    sequences: float,
    form: Form,
    cache: Cache = "bf16",
    acceptance: float | None = None,
) -> Decode:
    """A step with `sequences` on each data rank, each after `context` tokens, attention in the absorbed form.

    acceptance: probability that MTP's draft is accepted; then T = 2 and a step yields 1 + acceptance tokens (V3 report,
    section 5.4.3). None decodes without drafts. With pipeline stages the sequences are split into as many groups, which
    follow each other through the stages.
    """
    drafts = acceptance is not None and config.num_nextn_predict_layers > 0
    T = 2 if drafts else 1
    group = max(1.0, sequences / layout.pp)
    rates = Rates.of(device, form)
    slowest: dict[str, float] = {}
    for rank in range(layout.pipeline):
        part = share(config, layout, rank, form, mtp=drafts)
        parts = _decode_parts(config, device, layout, part, rates, context, group, T, cache, form)
        if sum(parts.values()) > sum(slowest.values()):
            slowest = parts
    rounds = layout.pp  # groups that a device works on in turn before the first comes round again
    parts = {name: seconds * rounds for name, seconds in slowest.items()}
    yielded = 1 + (acceptance or 0.0) if drafts else 1.0
    seconds = sum(parts.values())
    return Decode(parts, yielded, yielded / seconds, yielded * sequences * layout.dp / seconds / layout.devices)


def _decode_parts(
    config: ModelConfig,
    device: Device,
    layout: Layout,
    part: Share,
    rates: Rates,
    context: int,
    sequences: float,
    T: int,
    cache: Cache,
    form: Form,
) -> dict[str, float]:
    tokens = sequences * T
    own = tokens / (layout.tp * layout.cp)  # of the rank's tokens, those that this device sends to experts
    together = own * layout.ep  # tokens that share one set of experts
    cached = context * cache_row_bytes(config, cache) * part.layers / layout.cp
    H, C = config.num_attention_heads / layout.tp, config.kv_lora_rank
    scores = 2 * H * (config.cache_width + C) * context * part.layers / layout.cp
    touched = distinct_experts(config, together) / (config.n_routed_experts or 1)
    expert = part.expert_elements / max(1, part.experts_per_layer)  # of all layers, one expert each
    routed = 2 * expert * own * config.num_experts_per_tok
    parts = {
        "attention over the cache": max(sequences * cached / rates.bandwidth, tokens * scores / rates.attention),
        "weights of every token": max(
            part.common_bytes / rates.bandwidth, 2 * part.common_products * tokens / rates.matrix
        ),
        "experts": max(part.expert_bytes * touched / rates.bandwidth, routed / rates.matrix),
        "activations": own * activation_bytes(config, part) / rates.bandwidth,
        "fixed cost of layers": part.layers * device.layer_seconds,
        "experts' all-to-all": part.moe_layers
        * sum(traffic.low_latency(config, device, layout.ep, own, each) for each in sent_bytes(form)),
        "tensor parallel sums": part.layers * traffic.tensor_sums(config, device, layout.tp, tokens),
        "pipeline": traffic.hand_over(config, device, layout, tokens),
    }
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def sent_bytes(form: Form) -> tuple[float, float]:
    """Bytes of an element as it is dispatched to experts and as results are combined (V3 report, section 3.3.3)."""
    return (1.0, 2.0) if form == "fp8" else (2.0, 2.0)


def activation_bytes(config: ModelConfig, part: Share) -> float:
    """Bytes that one token's activations move through memory in a forward pass, kernel by kernel, in bf16.

    Counted once written and once read: norms and residuals 12 D, queries, keys, values and outputs of all heads, and of
    each FFN that it meets input and output 4 D and three rows of its width, 6 F.
    """
    D, H, F = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    heads = 4 * H * (config.qk_head_dim + config.v_head_dim)
    experts = config.num_experts_per_tok * (4 * D + 6 * F)
    if config.n_shared_experts:
        experts += 4 * D + 6 * F * config.n_shared_experts
    dense = 4 * D + 6 * config.intermediate_size
    elements = part.layers * (12 * D + heads) + part.moe_layers * experts + (part.layers - part.moe_layers) * dense
    return 2.0 * elements


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prefill on one device: seconds per token by part, tokens a second, and seconds to a prompt's first token."""

    parts: dict[str, float]
    per_device: float
    first_token: float


CHUNK = 4096  # tokens that go through a layer together on each data rank


def prefill(config: ModelConfig, device: Device, layout: Layout, *, context: int, form: Form) -> Prefill:
    """Whole prompts of `context` tokens, attention in the expanded form, all data ranks busy.

    A prompt's first token takes as long as its own rank needs for it while the others work on theirs.
    """
    rates, chunk = Rates.of(device, form), min(CHUNK, context)
    slowest: dict[str, float] = {}
    for rank in range(layout.pipeline):
        part = share(config, layout, rank, form, mtp=False)
        own = chunk / (layout.tp * layout.cp)
        expert = part.expert_elements / max(1, part.experts_per_layer)
        H = config.num_attention_heads / layout.tp
        scores = 2 * H * (config.qk_head_dim + config.v_head_dim) * (context + 1) / 2 * part.layers / layout.cp
        touched = distinct_experts(config, own * layout.ep) / (config.n_routed_experts or 1)
        parts = {
            "attention": chunk * scores / rates.attention,
            "weights of every token": max(
                part.common_bytes / rates.bandwidth, 2 * part.common_products * chunk / layout.cp / rates.matrix
            ),
            "experts": max(
                part.expert_bytes * touched / rates.bandwidth,
                2 * expert * own * config.num_experts_per_tok / rates.matrix,
            ),
            "activations": own * activation_bytes(config, part) / rates.bandwidth,
            "fixed cost of layers": part.layers * device.layer_seconds,
            "experts' all-to-all": part.moe_layers
            * sum(traffic.forwarded(config, device, layout.ep, own, each) for each in sent_bytes(form)),
            "tensor parallel sums": part.layers * traffic.tensor_sums(config, device, layout.tp, chunk / layout.cp),
            "pipeline": traffic.hand_over(config, device, layout, own),
        }
        if sum(parts.values()) > sum(slowest.values()):
            slowest = parts
    seconds = sum(slowest.values())
    kept = {name: value for name, value in slowest.items() if value > 0}
    rate = chunk * layout.dp / seconds / layout.devices
    return Prefill(kept, rate, context / chunk * seconds + (layout.pp - 1) * seconds)
