"""Serving on devices: memory of one of them, what fits, and a layout to begin with.

Letters: E experts. A data rank is tp * cp devices that share sequences; its latents lie whole on each tensor rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, floor
from typing import Any

from cavelight.errors import UserError
from cavelight.plan.activations import layer_tensors
from cavelight.plan.devices import Device
from cavelight.plan.layout import Layout
from cavelight.plan.memory import ROWS_AT_ONCE, Cache, cache_row_bytes
from cavelight.plan.share import Form, Share, share
from cavelight.plan.speed import Decode, Prefill, decode, prefill
from cavelight.spec.config import ModelConfig

USABLE = 0.90  # of a device's memory; the rest is for the runtime, buffers and fragments (vLLM's default share)
MOST_TOKENS = 256  # of a device in a step: DeepEP advises less for its low-latency buffers
MOST_DEVICES = 2048
PREFILL = 8192  # tokens that a device takes at once


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served how. context: tokens of each sequence. cache: format of the latents.

    acceptance: of MTP's draft; None serves without the prediction modules.
    """

    config: ModelConfig
    device: Device
    layout: Layout
    context: int
    form: Form
    cache: Cache = "bf16"
    acceptance: float | None = None

    def with_(self, **changes: Any) -> "Serving":
        return replace(self, **changes)

    @property
    def drafts(self) -> bool:
        return self.acceptance is not None and self.config.num_nextn_predict_layers > 0

    def memory(self, sequences: float) -> dict[str, float]:
        """Bytes on the fullest device with so many sequences on each data rank: memory.decoding_memory, but quickly."""
        tokens = min(PREFILL, ceil(self.context / self.layout.cp) * ceil(sequences))
        return self._fullest(sequences, tokens, min(self.context, ROWS_AT_ONCE))

    def _fullest(self, sequences: float, tokens: int, rows: int) -> dict[str, float]:
        ranks = (self._memory(rank, sequences, tokens, rows) for rank in range(self.layout.pipeline))
        return max(ranks, key=lambda parts: sum(parts.values()))

    def _memory(self, rank: int, sequences: float, tokens: int, rows: int) -> dict[str, float]:
        c, layout = self.config, self.layout
        part = share(c, layout, rank, self.form, self.drafts)
        sent = tokens * c.num_experts_per_tok * c.hidden_size * 4 if layout.ep > 1 else 0
        handed = 8 * tokens * c.hidden_size if layout.pp > 1 else 0
        parts = {
            "experts": part.expert_bytes,
            "other weights": part.table_bytes + part.common_bytes,
            "cache": sequences * self.context * self._cached(part),
            "activations": tokens / layout.tp * _layer_bytes(c) + self._keys(rows),
            "logits": sequences * self._logits,
            "communication": sent + handed,
            "runtime": self.device.runtime,
        }
        return {name: size for name, size in parts.items() if size}

    def _keys(self, rows: int) -> float:
        """Bytes of the keys and values that a prefill raises from latents at a time."""
        c = self.config
        return 2 * rows * (c.num_attention_heads // self.layout.tp) * (c.qk_head_dim + c.v_head_dim)

    @property
    def _logits(self) -> float:
        """Bytes of one sequence's logits in a step."""
        return 4 * self.config.vocab_size / self.layout.tp

    def _cached(self, part: Share) -> float:
        """Bytes of a token's latents on one device."""
        return cache_row_bytes(self.config, self.cache) * part.layers / self.layout.cp

    @property
    def free(self) -> float:
        """Bytes left for the cache on the fullest device beside a prefill; negative where not even that fits."""
        return USABLE * self.device.memory - sum(self._fullest(0, PREFILL, ROWS_AT_ONCE).values())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token's cache on the device that holds most layers."""
        ranks = range(self.layout.pipeline)
        return max(self._cached(share(self.config, self.layout, rank, self.form, self.drafts)) for rank in ranks)

    def most_sequences(self) -> int:
        """Sequences of the full context that fit on each data rank; 0 where none does."""
        return max(0, floor(self.free / (self.context * self.bytes_per_token + self._logits)))

    def largest_context(self, sequences: float = 1.0) -> int:
        """Tokens of context that fit with so many sequences on each data rank; 0 where the weights do not."""
        sequences = max(1.0, sequences)
        return max(0, floor((self.free / sequences - self._logits) / self.bytes_per_token))

    def busy_sequences(self) -> int:
        """Sequences on a data rank when decoding is busiest: what fits, up to MOST_TOKENS tokens of a device."""
        layout, tokens = self.layout, 2 if self.drafts else 1
        return min(self.most_sequences(), MOST_TOKENS * layout.tp * layout.cp * layout.pp // tokens)

    def sequences(self, batch: int | None) -> float:
        """Sequences on a data rank: a batch's share, below 1 where ranks stand idle, or as many as keep it busiest."""
        return self.busy_sequences() if batch is None else batch / self.layout.dp

    def holds(self, batch: int | None) -> bool:
        """Whether a batch fits, or a sequence on each data rank."""
        return self.most_sequences() >= (1 if batch is None else ceil(batch / self.layout.dp))

    def decode(self, sequences: float) -> Decode:
        return decode(
            self.config,
            self.device,
            self.layout,
            context=self.context,
            sequences=sequences,
            form=self.form,
            cache=self.cache,
            acceptance=self.acceptance,
        )

    def prefill(self) -> Prefill:
        return prefill(self.config, self.device, self.layout, context=self.context, form=self.form)


def layouts(config: ModelConfig, device: Device, count: int) -> Iterator[Layout]:
    """Layouts that serve on so many devices: tensor parallel inside nodes, data ranks beside, experts over all."""
    E, widest = config.n_routed_experts or 0, min(count, device.per_node)
    for tp in (tp for tp in range(1, widest + 1) if count % tp == 0 and fits_heads(config, tp)):
        ep = count if E else 1
        yield Layout(dp=count // tp, tp=tp, ep=ep, redundant=-E % ep if E else 0)


def fits_heads(config: ModelConfig, tp: int) -> bool:
    """Whether heads and dense layers can be cut in so many parts."""
    dense = any(not config.is_moe(layer) for layer in range(config.num_hidden_layers))
    return config.num_attention_heads % tp == 0 and (not dense or config.intermediate_size % tp == 0)


def best(serving: Serving, count: int, batch: int | None = None) -> Serving | None:
    """The layout on so many devices that decodes most tokens a second, of a batch if told; None where nothing fits."""
    tried = (serving.with_(layout=layout) for layout in layouts(serving.config, serving.device, count))
    fitting = [one for one in tried if one.holds(batch)]
    return max(fitting, key=lambda one: one.decode(one.sequences(batch)).per_device, default=None)


def roomiest(serving: Serving, count: int) -> Serving:
    """The layout on so many devices that comes nearest to fitting."""
    tried = (serving.with_(layout=layout) for layout in layouts(serving.config, serving.device, count))
    return max(tried, key=lambda one: one.free)


def counts(device: Device) -> Iterator[int]:
    """Numbers of devices worth asking about: one to a node's, then whole nodes."""
    yield from range(1, device.per_node + 1)
    if device.network:
        yield from range(2 * device.per_node, MOST_DEVICES + 1, device.per_node)


def smallest(serving: Serving) -> Serving | None:
    """The fewest devices that hold the model and one sequence of the context, in the layout fastest for one user."""
    weights = share(serving.config, Layout(), 0, serving.form, serving.drafts).bytes
    cache = (
        serving.context * serving.with_(layout=Layout()).bytes_per_token
    )  # whole on a device, however many there are
    for count in counts(serving.device):
        if weights / count + cache > USABLE * serving.device.memory:
            continue
        tried = [serving.with_(layout=layout) for layout in layouts(serving.config, serving.device, count)]
        fitting = [one for one in tried if one.most_sequences() > 0]
        if fitting:
            return max(fitting, key=lambda one: one.decode(1).per_sequence) if len(fitting) > 1 else fitting[0]
    return None


def sequences_per_rank(serving: Serving, batch: int | None) -> float:
    """`Serving.sequences`. Raises UserError for a batch that does not fit where one sequence would."""
    most = serving.most_sequences()
    if most and not serving.holds(batch):
        raise UserError(
            "So many sequences do not fit",
            got=f"{batch:,} of {serving.context:,} tokens on {serving.layout.devices} x {serving.device.name}",
            why=f"the memory left holds {most * serving.layout.dp:,}",
            do="take fewer or shorter sequences, more devices, or a narrower --format",
        )
    return serving.sequences(batch)


@lru_cache(maxsize=64)
def _layer_bytes(config: ModelConfig) -> float:
    """Bytes a token of all tensors of the widest layer."""
    return max(sum(t.bytes for t in layer_tensors(config, layer)) for layer in range(config.num_hidden_layers))
