"""How long training takes: seconds of a step under a layout, then tokens a second, hours and money.

Letters: F, B, W forward, whole backward and the weights' part of it, for one micro-batch on one stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil
from typing import Any

from cavelight.errors import UserError
from cavelight.plan import traffic
from cavelight.plan.devices import Device
from cavelight.plan.here import training_here
from cavelight.plan.layout import Layout, Schedule, held
from cavelight.plan.memory import Memory, training_memory
from cavelight.plan.pipeline import Chunk, step_seconds
from cavelight.plan.serving import MOST_DEVICES, USABLE
from cavelight.plan.share import Form, share
from cavelight.plan.speed import Rates, activation_bytes, sent_bytes
from cavelight.spec import cost
from cavelight.spec.config import ModelConfig
from cavelight.spec.sections import Recompute

# What training reaches of its kernels' sum, fitted to one figure: 180K H800 hours for 10^12 tokens (V3 report, table 1
# and section 3.1; 2048 devices, PP16 with DualPipe, EP64, 120 rows a pipeline and step). In it are the 20 of 132
# multiprocessors that communicate, quantisation, imbalance, data, checkpoints and whatever is not modelled.
TRAINING = 0.719


@dataclass(frozen=True, slots=True)
class Training:
    """A step of training, and the rate that follows from it.

    parts: seconds of a step by what takes them. utilisation: share of the device's dense bf16 peak that the model's
    own operations come to, recomputation not counted. bubble: share of the step that the pipeline stands idle.
    """

    parts: dict[str, float]
    tokens_per_step: int
    per_device: float
    utilisation: float
    bubble: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def days(self, tokens: float, devices: int) -> float:
        return tokens / (self.per_device * devices) / 86400

    def device_hours(self, tokens: float) -> float:
        return tokens / self.per_device / 3600


def train(
    config: ModelConfig,
    device: Device,
    layout: Layout,
    *,
    row: int,
    sequences: int,
    form: Form = "bf16",
    rows: int = 1,
    utilisation: float | None = None,
) -> Training:
    """A step of `sequences` rows of `row` tokens, `rows` of them in a micro-batch of each data rank.

    utilisation: of the device's bf16 peak, instead of the estimate from kernels, links and bubbles.
    """
    tokens = sequences * row
    work = tokens * cost.flops_per_token(config, 0, queries=row, form="expanded", training=True, mtp=True)
    most = layout.devices * device.peak("bf16")
    if utilisation is not None:
        seconds = work / most / utilisation
        return Training(
            {"all, at the given utilisation": seconds}, tokens, tokens / seconds / layout.devices, utilisation, 0.0
        )
    slowest = _slowest(config, device, layout, row, rows, form)
    busy, idle = step_seconds(layout.schedule, layout.pp, slowest, ceil(sequences / (layout.dp * rows)))
    parts = {
        "forward and backward": busy,
        "pipeline bubbles": idle,
        "gradients and weights": max(_gradients(config, device, layout, rank) for rank in range(layout.pipeline)),
    }
    parts = {name: seconds for name, seconds in parts.items() if seconds > 0}
    seconds = sum(parts.values())
    return Training(parts, tokens, tokens / seconds / layout.devices, work / seconds / most, idle / seconds)


def _slowest(config: ModelConfig, device: Device, layout: Layout, row: int, rows: int, form: Form) -> Chunk:
    """The chunk of the stage that all others wait for."""
    chunks = (_chunk(config, device, layout, stage, row, rows, form) for stage in range(layout.pp))
    return max(chunks, key=lambda chunk: chunk.pair)


def _gradients(config: ModelConfig, device: Device, layout: Layout, rank: int) -> float:
    mine = held(config, layout, rank)
    expert = sum(size for p, size in mine if p.role == "expert")
    common = sum(size for p, size in mine) - expert
    return traffic.gradients(device, layout, common, expert)


def _chunk(config: ModelConfig, device: Device, layout: Layout, stage: int, row: int, rows: int, form: Form) -> Chunk:
    """Seconds of one micro-batch on one stage, the experts' exchange in the open or, with DualPipe, behind the rest."""
    single = layout.with_(schedule="1f1b")
    part = share(config, single, stage, form)
    rates = Rates.of(device, form)
    tokens = row * rows / layout.cp
    own = tokens / layout.tp
    expert = part.expert_elements / max(1, part.experts_per_layer)
    H = config.num_attention_heads / layout.tp
    up = part.layers * H * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    products = 2 * (part.common_products * tokens + expert * own * config.num_experts_per_tok)
    scores = 2 * H * (config.qk_head_dim + config.v_head_dim) * (row + 1) / 2 * part.layers * tokens
    moved = own * activation_bytes(config, part) / rates.bandwidth
    linear, core = products / rates.matrix / TRAINING, scores / rates.attention / TRAINING
    other = moved / TRAINING + part.layers * device.layer_seconds
    forward = linear + core + other
    again = {
        "none": 0.0,
        "selective": other / 2 + 2 * up * tokens / rates.matrix / TRAINING,
        "full": forward,
    }[layout.recompute]
    exchange = part.moe_layers * sum(
        traffic.forwarded(config, device, layout.ep, own, each) for each in sent_bytes(form)
    )
    exposed = part.layers * traffic.tensor_sums(config, device, layout.tp, tokens) + _ring(
        config, device, layout, part.layers, row * rows
    )
    exposed += traffic.hand_over(config, device, layout, own)
    F, B = forward + exposed, 2 * forward + again + 2 * exposed
    if layout.pp > 1 and layout.schedule.startswith("dualpipe"):
        return Chunk(F + exchange, B + exchange, linear, max(F + B, 2 * exchange))
    return Chunk.of(F + exchange, B + exchange, linear)


def _ring(config: ModelConfig, device: Device, layout: Layout, layers: int, tokens: int) -> float:
    """Seconds of handing latents and rotary keys, in bf16, to the other context ranks."""
    if layout.cp == 1:
        return 0.0
    speed, fixed = traffic.message(device, inside=layout.cp * layout.tp <= device.per_node)
    passed = tokens * (layout.cp - 1) / layout.cp * config.cache_width * 2
    return layers * (passed / speed + fixed)


@dataclass(frozen=True)
class Plan:
    """Training on some devices: `sequences` rows of `row` tokens a step, `rows` of them in a micro-batch.

    form: bf16, or fp8 matrix products as DeepSeek-V3 had them. utilisation: of the bf16 peak, instead of an estimate.
    """

    config: ModelConfig
    device: Device
    layout: Layout
    row: int
    sequences: int
    rows: int = 1
    form: Form = "bf16"
    utilisation: float | None = None

    def with_(self, **changes: Any) -> "Plan":
        return replace(self, **changes)

    def laid(self, **changes: Any) -> "Plan | None":
        """This plan in a layout with some fields changed; None where the model cannot lie so."""
        try:
            layout = self.layout.with_(**changes).checked(self.config)
        except UserError:
            return None
        return self.with_(layout=layout)

    @property
    def micro_batches(self) -> int:
        return ceil(self.sequences / (self.layout.dp * self.rows))

    @cached_property
    def memory(self) -> Memory:
        """Of the fullest device; on a machine that was measured, of our own engine's process."""
        if self.device.measured:
            return training_here(
                self.config, row=self.row, rows=self.sequences, micro_rows=self.rows, runtime=round(self.device.runtime)
            )
        return training_memory(
            self.config,
            self.layout,
            row=self.row,
            rows=self.rows,
            micro_batches=self.micro_batches,
            precision="fp8" if self.form == "fp8" else "bf16",
            runtime=round(self.device.runtime),
        )

    @property
    def spare(self) -> float:
        """What is left of the usable memory, as a share of the device's; negative where it does not fit."""
        return USABLE - self.memory.total / self.device.memory

    @cached_property
    def speed(self) -> Training:
        return train(
            self.config,
            self.device,
            self.layout,
            row=self.row,
            sequences=self.sequences,
            form=self.form,
            rows=self.rows,
            utilisation=self.utilisation,
        )


def slowest_chunk(plan: Plan) -> Chunk:
    """Seconds of one micro-batch on the slowest stage of a plan."""
    return _slowest(plan.config, plan.device, plan.layout, plan.row, plan.rows, plan.form)


def layouts(config: ModelConfig, count: int) -> Iterator[Layout]:
    """Layouts to train in on so many devices, as DeepSeek-V3 was: pipeline and experts, ZeRO-1, no tensor parallelism.

    With each number of stages come the widest spread of experts up to 64 and as little recomputation as may fit.
    """
    E = config.n_routed_experts or 1
    for pp in (1, 2, 4, 8, 16):
        if count % pp or pp > config.num_hidden_layers:
            continue
        ranks = count // pp
        ep = max(d for d in range(1, min(64, ranks, E) + 1) if ranks % d == 0 and E % d == 0)
        kinds: tuple[Schedule, ...] = ("dualpipe", "1f1b") if pp > 1 else ("1f1b",)
        again: tuple[Recompute, ...] = ("none", "selective", "full")
        for kind, recompute in product(kinds, again):
            yield Layout(dp=ranks, ep=ep, pp=pp, zero=1 if ranks > 1 else 0, recompute=recompute, schedule=kind)


def best(plan: Plan, count: int) -> Plan | None:
    """The fastest of `layouts` on so many devices; None where none fits."""
    found: dict[tuple[int, str], Plan] = {}
    for layout in layouts(plan.config, count):
        kind = (layout.pp, layout.schedule)
        one = plan.with_(layout=layout)
        if kind not in found and one.sequences >= layout.dp * one.rows and one.spare >= 0:
            found[kind] = one  # with these stages, no more recomputation than this
    return max(found.values(), key=lambda one: one.speed.per_device, default=None)


def roomiest(plan: Plan, count: int) -> Plan:
    """The layout on so many devices that comes nearest to fitting."""
    return max((plan.with_(layout=layout) for layout in layouts(plan.config, count)), key=lambda one: one.spare)


def smallest(plan: Plan, rows_each: int = 1) -> Plan | None:
    """The fewest devices, by powers of two, that hold a training step; None beyond serving.MOST_DEVICES.

    A step has the plan's rows, or `rows_each` for each device if that is more.
    """
    states = 13 * cost.total_parameters(plan.config, mtp=True)  # bytes of all: weights, gradients, masters, moments
    count = 1
    most = MOST_DEVICES if plan.device.network else plan.device.per_node
    while count <= most:
        if states / count < USABLE * plan.device.memory:
            found = best(plan.with_(sequences=max(plan.sequences, rows_each * count)), count)
            if found is not None:
                return found
        count *= 2
    return None
