"""Single measurements: a prompt, a step of decoding at some depth and in some company, the verification of drafts.

Letters: T tokens of a step, M layers, Z slots, L width of a cache row, E experts.

The past of a measured step is random rows of the cache: what it costs to look at them does not depend on what they say,
and a depth of 16K need not be computed first. Tokens are random too, so that experts are met evenly.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from cavelight.kernels import attend
from cavelight.model.moe import MoE
from cavelight.model.ports import GroupedDispatch
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.run.engine import page_bytes
from cavelight.run.generate import CHUNK
from cavelight.run.paged import PagedCache, Span
from cavelight.run.quick import quick
from cavelight.run.rows import pack, row_bytes
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import Form, flops_per_token

SECONDS, LEAST, MOST = 2.0, 5, 200  # of steps that are timed: how long, at least and at most how many
WARM = 2  # steps before those
PAGE = 64  # positions
DRAWN = 4096  # rows of the cache that are filled at once

Kind = Literal["prompt", "decoding", "verifying"]


@dataclass(frozen=True)
class Case:
    """`batch` sequences with `depth` cached positions each take `tokens` more.

    Of a prompt, which goes through in chunks, only what follows its last token is asked for, as in `run.generate`.
    Decoding takes one token, verifying takes drafts too, and what follows is asked of each of them.
    """

    kind: Kind
    depth: int
    tokens: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        what = self.kind if self.kind == "decoding" else f"{self.kind} {self.tokens:,}"
        where = "" if self.kind == "prompt" and not self.depth else f" at {self.depth:,}"
        return what + where + (f", {self.batch:,} at once" if self.batch > 1 else "")

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Of every pass of the trunk: the first position and the number of tokens of each sequence."""
        end = self.depth + self.tokens
        return [(start, min(CHUNK, end - start)) for start in range(self.depth, end, CHUNK)]

    @property
    def rows(self) -> int:
        """Of the cache that a layer reads: every pass looks at all that is there by then."""
        return self.batch * sum(start + count for start, count in self.chunks)

    @property
    def pages(self) -> int:
        """Of the cache, for each sequence."""
        return -(-(self.depth + self.tokens) // PAGE)

    def once_is_enough(self, seconds: float) -> bool:
        """Of a long prompt, after warming up."""
        return self.kind == "prompt" and seconds > SECONDS


def cache_bytes(config: ModelConfig, case: Case, dtype: torch.dtype) -> int:
    """Of the cache that a case is measured with."""
    return case.batch * case.pages * page_bytes(config, PAGE, dtype)


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
def measure(
    model: Transformer,
    case: Case,
    clock: Callable[[], float] = time.perf_counter,
    cache: torch.dtype | None = None,
) -> Measured:
    """Time a case, as `generate` and the engine run the model. Memory: the caches of its sequences.

    cache: the rows' dtype; the weights' unless given.
    """
    config, weight, run = model.config, model.lm_head.weight, quick(model)
    dtype = cache or weight.dtype
    paged = PagedCache(config, case.batch * case.pages, PAGE, dtype, weight.device)
    for some_ZW in paged.rows_MZW.flatten(0, 1).split(DRAWN):
        some_ZW.copy_(pack(torch.randn(len(some_ZW), config.cache_width), config.kv_lora_rank, dtype))
    source = torch.Generator().manual_seed(0)
    seconds: list[float] = []
    met: list[float] = []
    ends = None
    while ends is None or len(seconds) < LEAST or (clock() < ends and len(seconds) < MOST):
        if ends is None and len(seconds) >= (1 if case.once_is_enough(sum(seconds)) else WARM):
            seconds, met, ends = [], [], clock() + SECONDS
        tokens_BT = torch.randint(config.vocab_size, (case.batch, case.tokens), generator=source)
        began = clock()
        routings = _step(run, paged, case, tokens_BT)
        seconds.append(clock() - began)
        met.append(sum(expert_bytes(model, some) for some in routings))
        if ends and case.once_is_enough(seconds[-1]):
            break
    weights = layer_bytes(model) * len(case.chunks) + head_bytes(model) + median(met)
    rows = case.rows * config.num_hidden_layers * row_bytes(config, dtype)
    return Measured(case, tuple(seconds), weights + rows, flops(config, case))


def _step(model: Transformer, cache: PagedCache, case: Case, tokens_BT: Tensor) -> list[list[Routing]]:
    """The trunk over all sequences, chunk by chunk, and the head where it is needed: the routing of each pass."""
    routings = []
    for start, count in case.chunks:
        tokens_bT = tokens_BT[:, start - case.depth :][:, :count]
        spans = [Span(range(b * case.pages, (b + 1) * case.pages), start, count) for b in range(case.batch)]
        positions_T = torch.arange(start, start + count).repeat(case.batch)
        hidden_TD, some = model(tokens_bT.flatten(), positions_T, cache.at(spans), GroupedDispatch())
        routings.append(some)
    model.head(hidden_TD[count - 1 :: count] if case.kind == "prompt" else hidden_TD)
    return routings


def layer_bytes(model: Transformer) -> int:
    """Of what every pass of the trunk reads whatever its tokens are: its layers but for the routed experts."""
    experts = [layer.mlp.experts for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    return _bytes(model.model.layers) - sum(map(_bytes, experts))


def head_bytes(model: Transformer) -> int:
    """Of what is read once, where the tokens are asked for that follow."""
    return _bytes(model.model.norm) + _bytes(model.lm_head)


def expert_bytes(model: Transformer, routings: Sequence[Routing]) -> float:
    """Of the routed experts that a pass met."""
    E = model.config.n_routed_experts or 1
    layers = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    return sum(
        _bytes(mlp.experts) / E * len(routing.ids_TK.unique()) for mlp, routing in zip(layers, routings, strict=True)
    )


def flops(config: ModelConfig, case: Case) -> float:
    """Of a step, by spec.cost, in the form that attention takes."""
    total, end = 0.0, case.depth + case.tokens
    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    for past, count in case.chunks:
        logits = 1.0 if case.kind != "prompt" else 1 / count if past + count == end else 0.0
        absorbed = attend.absorbed_is_cheaper(count, past + count, H, N, R, config.v_head_dim, config.kv_lora_rank)
        form: Form = "absorbed" if absorbed else "expanded"
        total += count * flops_per_token(config, past, queries=count, form=form, logits=logits)
    return total * case.batch


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensors in (module.parameters(), module.buffers()) for tensor in tensors)
