"""Models in every form of storage that kernels.native reads, and steps of theirs over caches that hold anything."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cavelight.model.moe import Experts
from cavelight.model.ports import Dispatch, GroupedDispatch
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.run import rows
from cavelight.run.paged import PagedCache, Span
from cavelight.run.quick import BUILD, QuickTrunk, quick
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import PACKED_ROLES, Format
from cavelight.spec.shapes import parameters
from cavelight.weights.quant import pack
from cavelight.weights.swap import STACKS, PackedExperts, PackedLinear

from .run_models import random_model

Store = torch.dtype | Format
STORES: list[Store] = [
    torch.float32,
    torch.bfloat16,
    Format("int", bits=8),
    Format("int", bits=8, group=32),
    Format("int", bits=4),
    Format("int", bits=4, group=32),
]


def stored(config: ModelConfig, store: Store, seed: int = 0, scale: torch.dtype = torch.bfloat16) -> Transformer:
    """A random model; what our own conversion packs is packed where `store` is a format, all else then bfloat16."""
    if isinstance(store, torch.dtype):
        return random_model(config, seed, store).requires_grad_(False)
    model = random_model(config, seed, torch.bfloat16).requires_grad_(False)
    roles = {p.name: p.role for p in parameters(config)}
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            put(model, name, packed_experts(module, store, config, scale))
        elif isinstance(module, nn.Linear) and roles[f"{name}.weight"] in PACKED_ROLES:
            put(model, name, packed_linear(module.weight, store, scale))
    return model


def packed_linear(weight_OI: Tensor, format: Format, scale: torch.dtype = torch.bfloat16) -> PackedLinear:
    return PackedLinear(pack(weight_OI, format, scale), format, (weight_OI.shape[0], weight_OI.shape[1]))


def packed_experts(module: Experts, format: Format, config: ModelConfig, scale: torch.dtype) -> PackedExperts:
    parts = {}
    for stack in STACKS:
        each = [pack(matrix, format, scale) for matrix in getattr(module, stack).unbind()]
        parts[stack] = {suffix: torch.stack([one[suffix] for one in each]) for suffix in each[0]}
        parts[stack].pop("weight_shape", None)
    return PackedExperts(parts, format, config.hidden_size, config.moe_intermediate_size)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@contextmanager
def plain_only() -> Iterator[None]:
    """As on a machine without a compiler."""
    before = BUILD.loaded, BUILD.reason
    BUILD.loaded, BUILD.reason = None, "a test is without"
    try:
        yield
    finally:
        BUILD.loaded, BUILD.reason = before


def native_view(model: Transformer) -> Transformer:
    """The view of a model all of whose layers go natively."""
    view = quick(model)
    assert view is not model and isinstance(view.model, QuickTrunk) and view.model.chain is not None
    assert BUILD.get(wait=True) is not None, BUILD.why_not()
    return view


@dataclass(frozen=True)
class Case:
    """A cache full of random rows, and the tokens that a step brings to some sequences in it."""

    cache: PagedCache
    spans: tuple[Span, ...]
    tokens: tuple[int, ...]

    def part(self, n: int, count: int | None = None) -> "Case":
        """The n-th sequence alone, and of it only the first `count` tokens."""
        first, span = sum(s.count for s in self.spans[:n]), self.spans[n]
        count = span.count if count is None else count
        return Case(self.cache, (replace(span, count=count),), self.tokens[first : first + count])


def case(config: ModelConfig, lengths: Sequence[tuple[int, int]], page: int, dtype: torch.dtype, seed: int = 0) -> Case:
    """For each sequence (past, tokens of this step). Pages lie in random order, with some of nobody's between."""
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    needed = [-(-(start + count) // page) for start, count in lengths]
    pages = source.sample(range(sum(needed) + 3), sum(needed))
    cache = PagedCache(config, sum(needed) + 3, page, dtype)
    for rows_ZW in cache.rows_MZW:
        rows_ZL = torch.randn(len(rows_ZW), config.cache_width, generator=generator)
        rows_ZW.copy_(rows.pack(rows_ZL, config.kv_lora_rank, dtype))
    spans = []
    for (start, count), number in zip(lengths, needed, strict=True):
        spans.append(Span(tuple(pages[:number]), start, count))
        pages = pages[number:]
    tokens = [source.randrange(config.vocab_size) for _ in range(sum(count for _, count in lengths))]
    return Case(cache, tuple(spans), tuple(tokens))


@dataclass(frozen=True)
class Outcome:
    """Of the trunk, and with drafts of every MTP module after it, all on the same spans."""

    hidden: list[Tensor]
    logits: list[Tensor]
    routings: list[Routing]
    rows_MZL: Tensor

    def all(self) -> list[Tensor]:
        routed = [t for r in self.routings for t in (r.ids_TK, r.weights_TK, r.scores_TE)]
        return [*self.hidden, *self.logits, *routed, self.rows_MZL]

    def rows(self) -> list[Tensor]:
        """What has a row for each token."""
        return self.all()[:-1]


def step(view: Transformer, case: Case, dispatch: Dispatch | None = None, **at: Any) -> Outcome:
    """One step of the trunk, then one of every module on it, over a copy of the cache."""
    cache = PagedCache(view.config, 0, case.cache.size, case.cache.rows_MZW.dtype)
    cache.rows_MZW = case.cache.rows_MZW.clone()
    tokens_T = torch.tensor(case.tokens)
    positions_T = torch.cat([torch.arange(span.start, span.end) for span in case.spans])
    attend, dispatch = cache.at(case.spans, **at), dispatch or GroupedDispatch()
    with torch.inference_mode():
        hidden_TD, routings = view(tokens_T, positions_T, attend, dispatch)
        hidden, logits = [hidden_TD], [view.head(hidden_TD)]
        for depth in range(len(view.mtp)):
            hidden_TD, more = view.draft(depth, hidden_TD, tokens_T, positions_T, attend, dispatch)
            hidden.append(hidden_TD)
            logits.append(view.draft_head(depth, hidden_TD))
            routings = [*routings, *more]
    return Outcome(hidden, logits, routings, unpacked(cache, view.config))


def unpacked(cache: PagedCache, config: ModelConfig) -> Tensor:
    """[M, Z, L]."""
    return torch.stack([rows.unpack(rows_ZW, config.kv_lora_rank) for rows_ZW in cache.rows_MZW])


def written(case: Case) -> Tensor:
    """Which slots the step's tokens have: [Z] booleans."""
    mask_Z = torch.zeros(case.cache.rows_MZW.shape[1], dtype=torch.bool)
    for span in case.spans:
        mask_Z[case.cache.slots(span)[span.start :]] = True
    return mask_Z


def assert_close(ours: Tensor, theirs: Tensor, error: float = 1e-5) -> None:
    """Up to `error` of the largest number."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    difference, largest = (ours.float() - theirs.float()).abs(), theirs.float().abs()
    if theirs.numel():
        assert difference.max() <= error * largest.max(), f"{difference.max() / largest.max():.1e}"
