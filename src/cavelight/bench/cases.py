"""Single measurements: a prompt, a step of decoding at some depth and in some company, the verification of drafts.

Letters: T tokens of a step, M layers, Z slots, L width of a cache row, E experts.

The past of a measured step is random rows of the cache: what it costs to look at them does not depend on what they say,
and a depth of 16K need not be computed first. Tokens are random too, so that experts are met evenly.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cavelight.kernels import attend
from cavelight.model.moe import MoE
from cavelight.model.ports import GroupedDispatch
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.run.generate import CHUNK
from cavelight.run.paged import PagedCache, Span
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import Form, flops_per_token, stored_bytes_per_token

SECONDS, LEAST, MOST = 2.0, 5, 200  # of steps that are timed: how long, at least and at most how many
WARM = 2  # steps before those


@dataclass(frozen=True)
class Case:
    """`batch` sequences with `depth` cached positions each take `tokens` more: many are a prompt, one is decoding."""

    depth: int
    tokens: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        what = "prompt" if self.tokens > CHUNK or (self.tokens > 16 and not self.depth) else "decoding"
        if what == "decoding" and self.tokens > 1:
            what = f"verifying {self.tokens}"
        company = f", {self.batch} at once" if self.batch > 1 else ""
        return f"{what} {self.tokens:,}" if what == "prompt" else f"{what} at {self.depth:,}{company}"


@dataclass(frozen=True)
class Measured:
    """seconds: of each step (a prompt's chunks together). read: bytes that a step has to read. flops: of a step."""

    case: Case
    seconds: tuple[float, ...]
    read: float
    flops: float

    @property
    def typical(self) -> float:
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.case.tokens * self.case.batch / self.typical


@torch.inference_mode()
def measure(model: Transformer, case: Case, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Time a case. Memory: the caches of its sequences. Raises nothing of its own."""
    size = 64
    pages = -(-(case.depth + case.tokens) // size)
    weight = model.lm_head.weight
    cache = PagedCache(model.config, pages * case.batch, size, weight.dtype, weight.device)
    cache.rows_MZL.normal_(0, 1)
    source = torch.Generator().manual_seed(0)
    seconds: list[float] = []
    met: list[float] = []
    ends = None
    while ends is None or len(seconds) < LEAST or (clock() < ends and len(seconds) < MOST):
        if len(seconds) == WARM and ends is None:
            seconds, met, ends = [], [], clock() + SECONDS
        tokens_BT = torch.randint(model.config.vocab_size, (case.batch, case.tokens), generator=source)
        began = clock()
        routings = _step(model, cache, case, tokens_BT, pages)
        seconds.append(clock() - began)
        met.append(sum(expert_bytes(model, some) for some in routings))
        if ends and case.tokens > CHUNK and seconds[-1] > SECONDS:
            break  # a long prompt, once after warming up
    chunks = max(1, -(-case.tokens // CHUNK)) if case.batch == 1 else 1
    fixed = plain_bytes(model) * chunks
    rows = case.batch * (case.depth + case.tokens) * stored_bytes_per_token(model.config, weight.element_size())
    return Measured(case, tuple(seconds), fixed + median(met) + rows, flops(model.config, case))


def _step(model: Transformer, cache: PagedCache, case: Case, tokens_BT: Tensor, pages: int) -> list[list[Routing]]:
    """The trunk over all sequences, a long prompt in chunks as `generate` takes it, and the head where it is needed."""
    routings = []
    for first in range(0, case.tokens, CHUNK):
        tokens_bT = tokens_BT[:, first : first + CHUNK]
        count, start = tokens_bT.shape[1], case.depth + first
        spans = [Span(range(b * pages, (b + 1) * pages), start, count) for b in range(case.batch)]
        positions_T = torch.arange(start, start + count).repeat(case.batch)
        hidden_TD, some = model(tokens_bT.flatten(), positions_T, cache.at(spans), GroupedDispatch())
        routings.append(some)
    model.head(hidden_TD if case.tokens <= 16 else hidden_TD[-1:])
    return routings


def plain_bytes(model: Transformer) -> int:
    """Of everything that every pass reads: all but routed experts, the embedding and the MTP modules."""
    experts = [layer.mlp.experts for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    whole = sum(map(_bytes, _tensors(model.model.layers))) - sum(sum(map(_bytes, _tensors(e))) for e in experts)
    return whole + sum(map(_bytes, _tensors(model.model.norm))) + sum(map(_bytes, _tensors(model.lm_head)))


def expert_bytes(model: Transformer, routings: Sequence[Routing]) -> float:
    """Of the routed experts that a pass met."""
    E = model.config.n_routed_experts or 1
    layers = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    return sum(
        sum(map(_bytes, _tensors(mlp.experts))) / E * len(routing.ids_TK.unique())
        for mlp, routing in zip(layers, routings, strict=True)
    )


def flops(config: ModelConfig, case: Case) -> float:
    """Of a step, by spec.cost, in the form that attention takes; a prompt's head is counted for every token."""
    total = 0.0
    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    for first in range(0, case.tokens, CHUNK):
        count, past = min(CHUNK, case.tokens - first), case.depth + first
        absorbed = attend.absorbed_is_cheaper(count, past + count, H, N, R, config.v_head_dim, config.kv_lora_rank)
        form: Form = "absorbed" if absorbed else "expanded"
        total += count * flops_per_token(config, past, queries=count, form=form)
    return total * case.batch


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
