"""How much memory one device needs to train or serve a model under a layout. No torch.

The worst device counts: every pipeline rank is computed. What our own engine takes on one machine is in here.py.
Letters are those of spec/shapes.py, and T tokens of a micro-batch on one device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from cavelight.plan.activations import (
    Kept,
    Precision,
    kept_bytes,
    layer_tensors,
    module_tensors,
    remade_bytes,
)
from cavelight.plan.layout import Layout, held, stages, stages_of
from cavelight.plan.share import Form, stored_bytes
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import Parameter

Cache = Literal["fp32", "bf16", "fp8"]
Moments = Literal["bf16", "fp32"]

RUNTIME = 2 * 10**9  # an accelerator's own context, kernels and communicators: an assumption, it is nowhere stated
ROWS_AT_ONCE = 16_384  # rows of the past that a prefill raises to keys and values at a time
ONE = Layout()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for, on the device that needs most; `where` names it."""

    parts: Mapping[str, int] = field(default_factory=dict)
    where: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def training_memory(
    config: ModelConfig,
    layout: Layout = ONE,
    *,
    row: int,
    rows: int = 1,
    micro_batches: int | None = None,
    precision: Precision = "bf16",
    moments: Moments = "bf16",
    logits_chunk: int | None = None,
    imbalance: float = 1.0,
    mtp: bool = True,
    runtime: int = RUNTIME,
) -> Memory:
    """Bytes of a training step on the worst device, as DeepSeek-V3 was trained unless told otherwise.

    row, rows: tokens of a row, rows of one micro-batch on a data rank. micro_batches: how many go through in a step; a
    full pipeline's worth unless told. precision: what weights and kept activations are in. Masters and gradients are
    float32, AdamW's two moments bfloat16 or float32 (V3 report, section 3.3.3). logits_chunk: tokens whose logits
    exist at a time; all of them unless told. imbalance: the busiest device's share of routed tokens over the mean.
    """
    layout = layout.checked(config)
    ranks = range(layout.pipeline)
    tokens = ceil(row * rows / (layout.tp * layout.cp))  # of a micro-batch on one device; sequence-parallel beside tp
    mtp = mtp and config.num_nextn_predict_layers > 0

    def on(rank: int) -> Memory:
        parts = _states(config, layout, rank, precision, moments, mtp)
        kept, remade = _activations(config, layout, rank, tokens, micro_batches, precision, imbalance, mtp)
        parts["activations"] = kept
        if layout.pp - 1 in stages_of(layout, rank):
            parts["logits"] = _logits(config, layout, row * rows // layout.cp, logits_chunk, mtp)
        parts["workspace"] = remade
        parts["communication"] = _communication(config, layout, rank, tokens, precision, imbalance, mtp)
        parts["runtime"] = runtime
        return Memory(parts, _named(layout, rank))

    return max((on(rank) for rank in ranks), key=lambda memory: memory.total)


def decoding_memory(
    config: ModelConfig,
    layout: Layout = ONE,
    *,
    context: int,
    sequences: int = 1,
    form: Form = "bf16",
    cache: Cache = "bf16",
    prefill: int = 8192,
    mtp: bool = True,
    runtime: int = RUNTIME,
) -> Memory:
    """Bytes of serving `sequences` of `context` tokens each, on the worst device.

    sequences are spread over the data ranks; a device keeps the latents of all heads whatever tp is, and its share of
    the context under cp. form: of the weights. cache: bf16, or FlashMLA's fp8 layout (see cache_row_bytes).
    prefill: tokens that a device takes at once. mtp: its modules' weights, and their rows of the cache.
    """
    layout = layout.checked(config)
    mtp = mtp and config.num_nextn_predict_layers > 0
    rows = ceil(context / layout.cp) * ceil(sequences / layout.dp)
    tokens = min(prefill, ceil(context / layout.cp) * ceil(sequences / layout.dp))

    def on(rank: int) -> Memory:
        parts = {"weights": 0, "MTP weights": 0}
        for p, elements in held(config, layout, rank, mtp):
            parts["MTP weights" if p.name.startswith("mtp.") else "weights"] += _part(p, elements, form)
        layers = _layers(config, layout, rank, mtp)
        parts["cache"] = len(layers) * rows * cache_row_bytes(config, cache)
        parts["activations"] = _prefill(config, layout, layers, tokens, min(context, ROWS_AT_ONCE))
        if layout.pp - 1 in stages_of(layout, rank):
            parts["logits"] = 4 * ceil(sequences / layout.dp) * ceil(config.vocab_size / layout.tp)
        parts["communication"] = _communication(config, layout, rank, tokens, "bf16", 1.0, mtp)
        parts["runtime"] = runtime
        return Memory(parts, _named(layout, rank))

    return max((on(rank) for rank in range(layout.pipeline)), key=lambda memory: memory.total)


def cache_row_bytes(config: ModelConfig, cache: Cache = "bf16") -> int:
    """Bytes that a layer keeps of one token: C + R elements (V3: 1,152 in bf16).

    fp8 is FlashMLA's layout: the latent in E4M3 with a float32 scale for each 128, the rotary key in bf16 (V3: 656).
    """
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    if cache == "fp8":
        return C + 4 * ceil(C / 128) + 2 * R
    return (C + R) * (4 if cache == "fp32" else 2)


def in_flight(layout: Layout, stage: int, micro_batches: int | None = None) -> int:
    """Micro-batches whose activations a stage keeps at most: pp - stage, in all schedules.

    A device with stage 0 keeps pp of them (1F1B, ZB1P); one with stages r and pp - 1 - r keeps pp + 1 (DualPipe and
    DualPipeV; V3 report, table 2).
    """
    most = layout.pp - stage
    return most if micro_batches is None else min(most, micro_batches)


def _states(
    config: ModelConfig, layout: Layout, rank: int, precision: Precision, moments: Moments, mtp: bool
) -> dict[str, int]:
    """Weights, masters, gradients, moments. ZeRO cuts what equal devices would all hold."""
    parts = dict.fromkeys(("weights", "masters", "gradients", "optimizer"), 0)
    moment = 2 if moments == "bf16" else 4
    for p, elements in held(config, layout, rank, mtp):
        equal = layout.replicas(p.role) * (2 if layout.schedule == "dualpipe" else 1)  # both ends hold the stage
        share = ceil(elements / equal)
        parts["weights"] += _part(p, share if layout.zero == 3 else elements, precision)
        if p.role == "routing_bias":
            continue  # a buffer: no gradient, no optimizer
        parts["masters"] += 4 * (share if layout.zero else elements)
        parts["gradients"] += 4 * (share if layout.zero == 3 else elements)
        parts["optimizer"] += 2 * moment * (share if layout.zero else elements)
    return parts


def _activations(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    tokens: int,
    micro_batches: int | None,
    precision: Precision,
    imbalance: float,
    mtp: bool,
) -> tuple[int, int]:
    """What is kept for all micro-batches in flight, and the most that one layer's backward pass remakes."""
    kept, most = 0.0, 0.0
    by_stage = stages(config, layout)
    for stage in stages_of(layout, rank):
        layers = [_busiest(layer_tensors(config, layer, precision), imbalance) for layer in by_stage[stage]]
        if mtp and stage == layout.pp - 1:
            for module in range(config.num_nextn_predict_layers):
                layer = layer_tensors(config, config.num_hidden_layers + module, precision)
                layers.append((*_busiest(layer, imbalance), *module_tensors(config, precision)))
        count = in_flight(layout, stage, micro_batches)
        kept += count * sum(kept_bytes(tensors, layout.recompute) for tensors in layers)
        most = max([most, *(remade_bytes(tensors, layout.recompute) for tensors in layers)])
    return ceil(tokens * kept), ceil(tokens * most)


def _busiest(tensors: tuple[Kept, ...], imbalance: float) -> tuple[Kept, ...]:
    """A layer's tensors on the device whose experts get `imbalance` times the mean."""
    routed = ("dispatched x", "experts: ", "experts' output")
    return tuple(
        Kept(t.name, ceil(t.elements * imbalance), t.bits, t.remade) if t.name.startswith(routed) else t
        for t in tensors
    )


def _logits(config: ModelConfig, layout: Layout, tokens: int, chunk: int | None, mtp: bool) -> int:
    """float32 logits, which become their own gradient, and that in bf16. In chunks there is one of all depths' at once.

    The vocabulary is cut over tp, so every device of it sees all tokens.
    """
    depths = 1 + config.num_nextn_predict_layers * mtp
    at_once = tokens * depths if chunk is None else min(chunk, tokens)
    return (4 + 2) * at_once * ceil(config.vocab_size / layout.tp)


def _communication(
    config: ModelConfig, layout: Layout, rank: int, tokens: int, precision: Precision, imbalance: float, mtp: bool
) -> int:
    """Buffers: tokens dispatched (in fp8 where training is) and combined (bf16), stage to stage, ZeRO-3's gathers."""
    D, K = config.hidden_size, config.num_experts_per_tok
    total = 0
    if layout.ep > 1:
        total += ceil(tokens * K * imbalance) * D * ((1 if precision == "fp8" else 2) + 2)
    if layout.pp > 1:
        total += 4 * tokens * D * 2  # in and out, of activations and of gradients
    if layout.zero == 3:
        total += 2 * _largest_layer(config, layout, rank, precision, mtp)  # the one in use and the next
    return total


def _largest_layer(config: ModelConfig, layout: Layout, rank: int, precision: Precision, mtp: bool) -> int:
    sizes: dict[str, int] = {}
    for p, elements in held(config, layout, rank, mtp):
        layer = ".".join(p.name.split(".")[:3]) if p.name.startswith("model.layers.") else p.name.split(".weight")[0]
        sizes[layer] = sizes.get(layer, 0) + _part(p, elements, precision)
    return max(sizes.values())


def _part(p: Parameter, elements: int, form: Form) -> int:
    """Bytes of so many elements of a parameter; scales are shared out evenly."""
    return ceil(elements * stored_bytes(p, form) / p.size)


def _layers(config: ModelConfig, layout: Layout, rank: int, mtp: bool) -> list[int]:
    """Layers with a cache on a pipeline rank; prediction modules count as layers after the last."""
    by_stage = stages(config, layout)
    layers = [layer for stage in stages_of(layout, rank) for layer in by_stage[stage]]
    if mtp and layout.pp - 1 in stages_of(layout, rank):
        layers += range(config.num_hidden_layers, config.num_layers_with_mtp)
    return layers


def _prefill(config: ModelConfig, layout: Layout, layers: list[int], tokens: int, rows: int) -> int:
    """The most that one layer has at once: its tensors for the chunk, and keys and values of the rows looked at."""
    H, N, R, U = (
        config.num_attention_heads // layout.tp,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    layer = max(sum(t.bytes for t in layer_tensors(config, layer)) for layer in layers)
    return ceil(ceil(tokens / layout.tp) * layer) + 2 * rows * H * (N + R + U)


def _named(layout: Layout, rank: int) -> str:
    if layout.pipeline == 1:
        return "every device"
    return "stage " + " and ".join(str(stage) for stage in stages_of(layout, rank))
