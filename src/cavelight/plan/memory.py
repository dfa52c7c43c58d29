"""How much memory one device needs to train or serve a model under a layout. No torch.

The worst device counts: every pipeline rank is computed. What our own engine takes on one machine is in here.py.
Letters are those of spec/shapes.py, and T tokens of a micro-batch on one device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from cavelight.plan.activations import (
    Kept,
    Precision,
    busiest,
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
    """Bytes by what they are for, and where or when it is that they are the most."""

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
    rank: int | None = None,
) -> Memory:
    """Bytes of a training step on the worst device, or on one of a pipeline `rank`, as DeepSeek-V3 was trained.

    row, rows: tokens of a row, rows of one micro-batch on a data rank. micro_batches: how many go through in a step; a
    full pipeline's worth unless told. precision: what weights and kept activations are in. Masters and gradients are
    float32, AdamW's two moments bfloat16 or float32 (V3 report, section 3.3.3). logits_chunk: tokens whose logits
    exist at a time; all of them unless told. imbalance: the busiest device's share of routed tokens over the mean.
    """
    layout = layout.checked(config)
    mtp = mtp and config.num_nextn_predict_layers > 0
    tokens = ceil(row * rows / (layout.tp * layout.cp))  # tp devices share a sequence wherever they do not share heads
    depths = 1 + config.num_nextn_predict_layers * mtp

    def on(rank: int) -> Memory:
        parts = _states(config, layout, rank, precision, moments, mtp)
        most = 0.0
        for stage in stages_of(layout, rank):
            layers = [busiest(t, imbalance) for t in _stage_tensors(config, layout, stage, precision, mtp)]
            kept = in_flight(layout, stage, micro_batches) * sum(kept_bytes(t, layout.recompute) for t in layers)
            parts["activations"] = parts.get("activations", 0) + ceil(tokens * kept)
            most = max([most, *(remade_bytes(t, layout.recompute) for t in layers)])
        if layout.pp - 1 in stages_of(layout, rank):
            # Every device of tp sees all tokens, for its part of the vocabulary: float32 logits, and in bf16 their
            # gradient. Without chunks those of all depths are there together.
            whole = ceil(row * rows / layout.cp)
            at_once = whole * depths if logits_chunk is None else min(logits_chunk, whole)
            parts["logits"] = (4 + 2) * at_once * ceil(config.vocab_size / layout.tp)
        parts["workspace"] = ceil(tokens * most)
        sent = ceil(tokens * config.num_experts_per_tok * imbalance) * config.hidden_size
        parts["communication"] = sent * ((1 if precision == "fp8" else 2) + 2) if layout.ep > 1 else 0
        parts["communication"] += _handed_on(config, layout, tokens)
        if layout.zero == 3:
            parts["communication"] += 2 * _largest_layer(config, layout, rank, precision, mtp)  # in use, and the next
        parts["runtime"] = runtime
        return Memory(parts, _name(layout, rank))

    return _worst(layout, on, rank)


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
    rank: int | None = None,
) -> Memory:
    """Bytes of serving `sequences` of `context` tokens each, on the worst device or on one of a pipeline `rank`.

    sequences are spread over the data ranks; a device keeps the latents of all heads whatever tp is, and its share of
    the context under cp. form: of the weights. cache: bf16, or FlashMLA's fp8 layout (see cache_row_bytes).
    prefill: tokens that a device takes at once. mtp: its modules' weights, and their rows of the cache.
    """
    layout = layout.checked(config)
    mtp = mtp and config.num_nextn_predict_layers > 0
    each = ceil(sequences / layout.dp)
    rows = ceil(context / layout.cp) * each
    tokens = min(prefill, rows)

    def on(rank: int) -> Memory:
        parts = {"weights": 0, "MTP weights": 0}
        for p, elements in held(config, layout, rank, mtp):
            parts["MTP weights" if p.name.startswith("mtp.") else "weights"] += _bytes(p, elements, form)
        layers = _cached_layers(config, layout, rank, mtp)
        parts["cache"] = len(layers) * rows * cache_row_bytes(config, cache)
        parts["activations"] = _prefill_bytes(config, layout, layers, tokens, min(context, ROWS_AT_ONCE))
        if layout.pp - 1 in stages_of(layout, rank):
            parts["logits"] = 4 * each * ceil(config.vocab_size / layout.tp)
        sent = tokens * config.num_experts_per_tok * config.hidden_size
        parts["communication"] = (sent * (2 + 2) if layout.ep > 1 else 0) + _handed_on(config, layout, tokens)
        parts["runtime"] = runtime
        return Memory(parts, _name(layout, rank))

    return _worst(layout, on, rank)


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

    So a device with stage 0 keeps pp of them (1F1B, ZB1P), and one with stages r and pp - 1 - r keeps pp + 1 (DualPipe
    and DualPipeV; V3 report, table 2).
    """
    most = layout.pp - stage
    return most if micro_batches is None else min(most, micro_batches)


def _worst(layout: Layout, on: Callable[[int], Memory], rank: int | None) -> Memory:
    if rank is not None:
        return on(rank)
    return max((on(each) for each in range(layout.pipeline)), key=lambda memory: memory.total)


def _states(
    config: ModelConfig, layout: Layout, rank: int, precision: Precision, moments: Moments, mtp: bool
) -> dict[str, int]:
    """Weights, masters, gradients, moments. ZeRO cuts what equal devices would all hold."""
    parts = dict.fromkeys(("weights", "masters", "gradients", "optimizer"), 0)
    for p, elements in held(config, layout, rank, mtp):
        equal = layout.replicas(p.role) * (2 if layout.schedule == "dualpipe" else 1)  # both ends hold the stage
        share = ceil(elements / equal)
        parts["weights"] += _bytes(p, share if layout.zero == 3 else elements, precision)
        if p.role == "routing_bias":
            continue  # a buffer: no gradient, no optimizer
        parts["masters"] += 4 * (share if layout.zero else elements)
        parts["gradients"] += 4 * (share if layout.zero == 3 else elements)
        parts["optimizer"] += 2 * (2 if moments == "bf16" else 4) * (share if layout.zero else elements)
    return parts


def _stage_tensors(
    config: ModelConfig, layout: Layout, stage: int, precision: Precision, mtp: bool
) -> list[tuple[Kept, ...]]:
    """What each layer of a stage keeps of a token; the last stage has the prediction modules too."""
    layers = [layer_tensors(config, layer, precision) for layer in stages(config, layout)[stage]]
    if mtp and stage == layout.pp - 1:
        joined = module_tensors(config, precision)
        modules = range(config.num_hidden_layers, config.num_layers_with_mtp)
        layers += [(*layer_tensors(config, layer, precision), *joined) for layer in modules]
    return layers


def _handed_on(config: ModelConfig, layout: Layout, tokens: int) -> int:
    """Hidden states from stage to stage in bf16, in and out, on the way forward and back."""
    return 4 * 2 * tokens * config.hidden_size if layout.pp > 1 else 0


def _largest_layer(config: ModelConfig, layout: Layout, rank: int, form: Form, mtp: bool) -> int:
    """Bytes of the largest layer of a rank, or of the embedding or head where those are larger."""
    sizes: dict[str, int] = {}
    for p, elements in held(config, layout, rank, mtp):
        parts = p.name.split(".")
        layer = ".".join(parts[:3] if parts[1] == "layers" else parts[:2])
        sizes[layer] = sizes.get(layer, 0) + _bytes(p, elements, form)
    return max(sizes.values())


def _bytes(p: Parameter, elements: int, form: Form) -> int:
    """Bytes of so many elements of a parameter; scales are shared out evenly."""
    return ceil(elements * stored_bytes(p, form) / p.size)


def _cached_layers(config: ModelConfig, layout: Layout, rank: int, mtp: bool) -> list[int]:
    """Layers with a cache on a pipeline rank; prediction modules count as layers after the last."""
    by_stage = stages(config, layout)
    layers = [layer for stage in stages_of(layout, rank) for layer in by_stage[stage]]
    if mtp and layout.pp - 1 in stages_of(layout, rank):
        layers += range(config.num_hidden_layers, config.num_layers_with_mtp)
    return layers


def _prefill_bytes(config: ModelConfig, layout: Layout, layers: list[int], tokens: int, rows: int) -> int:
    """The most that one layer has at once: its tensors for the chunk, and keys and values of the rows looked at."""
    H, U = config.num_attention_heads // layout.tp, config.v_head_dim
    layer = max(sum(t.bytes for t in layer_tensors(config, layer)) for layer in layers)
    return ceil(ceil(tokens / layout.tp) * layer) + 2 * rows * H * (config.qk_head_dim + U)


def _name(layout: Layout, rank: int) -> str:
    if layout.pipeline == 1:
        return "every device"
    held_stages = stages_of(layout, rank)
    return f"stage{'s' if len(held_stages) > 1 else ''} {' and '.join(map(str, held_stages))}"
