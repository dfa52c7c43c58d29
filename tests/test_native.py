"""Layers in C++ against the same view of the model without them: every number, every form of storage."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from cavelight.run.invariant import DispatchAlone, RowBlocks
from cavelight.run.paged import PagedCache
from cavelight.run.quick import FEW
from cavelight.run.rows import pack, unpack
from cavelight.spec.config import ModelConfig

from .native_views import (
    STORES,
    Case,
    Outcome,
    Store,
    assert_close,
    case,
    native_view,
    plain_only,
    step,
    stored,
    unpacked,
    written,
)
from .reference.tiny import V2, V3, tiny, yarn
from .run_models import small_config

ODD = {
    "hidden_size": 50,
    "intermediate_size": 131,
    "moe_intermediate_size": 37,
    "q_lora_rank": 21,
    "qk_nope_head_dim": 7,
    "v_head_dim": 9,
    "vocab_size": 47,
}
WIDE = {"hidden_size": 200, "intermediate_size": 265, "moe_intermediate_size": 136, "q_lora_rank": 144}
DENSE = {"n_routed_experts": None, "first_k_dense_replace": 2}
CONFIGS: dict[str, ModelConfig] = {
    "v3": small_config(),
    "v3 yarn": small_config(rope_scaling=yarn(64), num_attention_heads=3, qk_rope_head_dim=4),
    "v3 one group": tiny(V3, num_attention_heads=5, kv_lora_rank=32, num_nextn_predict_layers=3),
    "v3 odd": small_config(**ODD, num_attention_heads=17, qk_rope_head_dim=6),
    "v3 wide": small_config(**WIDE, kv_lora_rank=48, qk_rope_head_dim=64),
    "v3 no norm": small_config(norm_topk_prob=False, n_shared_experts=None, qk_rope_head_dim=32),
    "v2": tiny(V2, qk_rope_head_dim=16, num_nextn_predict_layers=1),
    "v2 groups": tiny(V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, rope_scaling=yarn(32, 0.7)),
    "v2 odd": tiny(V2, **(ODD | {"q_lora_rank": None}), num_attention_heads=16, routed_scaling_factor=16.0),
    "v2 no shared": tiny(V2, n_shared_experts=None, num_attention_heads=1, kv_lora_rank=48),
    "dense": small_config(**DENSE),
    "dense odd": small_config(**DENSE, **ODD, num_nextn_predict_layers=2, num_attention_heads=18),
    "all routed": small_config(first_k_dense_replace=0, num_experts_per_tok=4, topk_group=2),
}
LENGTHS = [0, 1, 15, 16, 63, 64, 65, 127, 128, 255, 511, 512, 513, 767, 769, 1000]


def some_lengths(source: random.Random, most: int = FEW) -> list[tuple[int, int]]:
    """Up to five sequences, with pasts of any length and `most` tokens of a step together."""
    left, lengths = most, []
    for _ in range(source.randrange(1, 6)):
        count = min(left, source.choice((1, 1, 1, 2, 3, 4, 5, 7, 9, 16, most)))
        if count:
            lengths.append((source.choice((source.choice(LENGTHS), source.randrange(300))), count))
        left -= count
    return lengths


def assert_alike(model: Any, given: Case, error: float = 1e-5, **at: Any) -> None:
    """What the step gives natively and plainly, and that it writes its own rows alone."""
    view = native_view(model)
    ours = step(view, given, **at)
    with plain_only():
        theirs = step(view, given, **at)
    for a, b in zip(ours.all(), theirs.all(), strict=True):
        assert_close(a, b, error)
    for mine, other in zip(ours.routings, theirs.routings, strict=True):
        assert torch.equal(mine.ids_TK, other.ids_TK)
    others_Z = ~written(given)
    assert torch.equal(ours.rows_MZL[:, others_Z], unpacked(given.cache, model.config)[:, others_Z])


@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_is_that_of_the_plain_twin(name: str, store: Store) -> None:
    config, source = CONFIGS[name], random.Random(name + str(store))
    model = stored(config, store)
    for n in range(4):
        given = case(config, some_lengths(source), source.choice((1, 4, 64)), torch.float32, seed=n)
        assert_alike(model, given)


@pytest.mark.parametrize("store", STORES, ids=str)
def test_a_cache_in_bfloat16(store: Store) -> None:
    """Its rows are rounded, and a last bit before that may round one differently: half a per cent of one number."""
    several = [small_config(kv_lora_rank=C) for C in (32, 80, 128)]  # whole pairs of sixteen, and what is left over
    for n, config in enumerate([*(CONFIGS[name] for name in ("v3", "v3 odd", "v3 wide", "v2")), *several]):
        given = case(config, some_lengths(random.Random(n)), 4, torch.bfloat16, seed=n)
        assert_alike(stored(config, store), given, 4e-3)


@pytest.mark.parametrize("store", STORES, ids=str)
def test_a_cache_in_int8(store: Store) -> None:
    """There a last bit may make one number another step of 127 in its group's largest."""
    several = [small_config(kv_lora_rank=C) for C in (128, 144, 272)]  # groups of 128, and what is left over
    for n, config in enumerate([*(CONFIGS[name] for name in ("v3", "v3 odd", "v3 wide", "v2")), *several]):
        given = case(config, some_lengths(random.Random(n)), 4, torch.int8, seed=n)
        assert_alike(stored(config, store), given, 8e-3)


@pytest.mark.parametrize(("C", "R"), [(16, 6), (144, 8), (272, 10), (512, 64)])
def test_rows_in_int8_are_packed_to_the_bit(C: int, R: int) -> None:
    """Of the first layer, whose rows hang on no others: those that it writes in float32, as run/rows.py packs them."""
    config = small_config(kv_lora_rank=C, qk_rope_head_dim=R)
    view = native_view(stored(config, torch.float32))
    exact, rounded = (case(config, [(5, 20), (0, 12)], 3, dtype) for dtype in (torch.float32, torch.int8))
    mine_Z = written(exact)
    expected_ZL = unpack(pack(step(view, exact).rows_MZL[0, mine_Z], C, torch.int8), C)
    assert torch.equal(step(view, rounded).rows_MZL[0, mine_Z], expected_ZL)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 31, 32, 33, 40])
def test_invariant_steps_of_any_size(tokens: int) -> None:
    model = stored(CONFIGS["v3 odd"], torch.bfloat16)
    lengths = [(0, tokens - tokens // 3), (70, tokens // 3)][: 1 + (tokens > 2)]
    given = case(CONFIGS["v3 odd"], lengths, 4, torch.float32)
    view = native_view(model)
    with RowBlocks():
        ours = step(view, given, DispatchAlone(), alone=True)
        with plain_only():
            theirs = step(view, given, DispatchAlone(), alone=True)
    for a, b in zip(ours.all(), theirs.all(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("length", [4095, 4096, 5119, 5120, 5121])
def test_long_pasts(length: int) -> None:
    config = small_config(num_attention_heads=5, max_position_embeddings=8192)
    lengths = [(length, 2), (3, 1), (1024, 3)]
    assert_alike(stored(config, torch.float32), case(config, lengths, 64, torch.float32))
    assert_alike(stored(config, torch.float32), case(config, lengths, 64, torch.int8), 8e-3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize("name", ["v3", "v3 odd", "v3 wide", "v2 odd", "v3 one group"])
def test_a_row_does_not_depend_on_its_company(name: str, store: Store, threads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config, source = CONFIGS[name], random.Random(name)
    view = native_view(stored(config, store))
    for n, dtype in enumerate((torch.float32, torch.bfloat16, torch.int8)):
        given = case(config, some_lengths(source), 4, dtype, seed=n)
        whole, first = step(view, given), 0
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        for i, span in enumerate(given.spans):
            for count in {1, (span.count + 1) // 2, span.count}:
                part = given.part(i, count)
                assert_same_rows(whole, step(view, moved(part)), first, count, given, moved(part))
            first += span.count


def assert_same_rows(whole: Outcome, some: Outcome, first: int, count: int, given: Case, part: Case) -> None:
    """Rows `first` and after of one outcome are, to the bit, another one's; so is what they wrote."""
    for ours, theirs in zip(some.rows(), whole.rows(), strict=True):
        assert torch.equal(ours, theirs[first : first + count])
    slots_T = torch.cat([given.cache.slots(span)[span.start :] for span in given.spans])[first : first + count]
    (span,) = part.spans
    ours = some.rows_MZL[:, part.cache.slots(span)[span.start :]]
    assert torch.equal(ours, whole.rows_MZL[:, slots_T])


def moved(part: Case) -> Case:
    """The same sequence in a cache with other pages, of another size."""
    (span,), rows_MZW = part.spans, part.cache.rows_MZW
    pages = tuple(range(-(-span.end // 16)))[::-1]
    cache = PagedCache(small_config(), len(pages), 16, rows_MZW.dtype)
    cache.rows_MZW = rows_MZW.new_full((rows_MZW.shape[0], 16 * len(pages), rows_MZW.shape[2]), 7)
    there = replace(span, pages=pages)
    past = slice(span.start)
    cache.rows_MZW[:, cache.slots(there)[past]] = rows_MZW[:, part.cache.slots(span)[past]]
    return Case(cache, (there,), part.tokens)
