"""Rows in int8: what they keep, and that decoding over them gives one answer however it is made."""

import random
from typing import Any

import pytest
import torch

from cavelight.errors import UserError
from cavelight.kernels import attend
from cavelight.model.ports import GroupedDispatch
from cavelight.plan.memory import cache_row_bytes
from cavelight.run.cache import LatentCache
from cavelight.run.engine import Engine, page_bytes
from cavelight.run.generate import TokenStream
from cavelight.run.request import Request
from cavelight.run.rows import GROUP, MOST, cache_dtype, pack, row_bytes, unpack
from cavelight.run.sample import Sampling
from cavelight.spec.presets import preset
from cavelight.spec.variants import with_plain_attention

from .native_views import native_view, plain_only
from .run_models import drafting_model, random_model, small_config

SIZES = [(16, 4), (128, 64), (144, 8), (512, 64)]


@pytest.mark.parametrize(("C", "R"), SIZES)
def test_a_number_is_off_by_half_a_step_of_its_group(C: int, R: int) -> None:
    rows_TL = torch.randn(50, C + R, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 50)[:, None]
    stored_TW = pack(rows_TL, C, torch.int8)
    assert stored_TW.dtype == torch.int8 and stored_TW.shape == (50, C + 4 * -(-C // GROUP) + 2 * R)
    again_TL = unpack(stored_TW, C)
    for first in range(0, C, GROUP):
        group_TX, kept_TX = rows_TL[:, first : min(first + GROUP, C)], again_TL[:, first : min(first + GROUP, C)]
        step_T = group_TX.abs().amax(dim=1) / MOST
        assert ((group_TX - kept_TX).abs() <= 0.5001 * step_T[:, None]).all()
        assert torch.equal(kept_TX.abs().amax(dim=1), step_T * MOST)
    assert torch.equal(again_TL[:, C:], rows_TL[:, C:].bfloat16().float())
    assert torch.equal(unpack(pack(again_TL, C, torch.int8), C), again_TL)


def test_what_is_nothing_or_no_number() -> None:
    rows_TL = torch.zeros(4, 20)
    rows_TL[1, 3], rows_TL[2, 17], rows_TL[3, :16] = torch.nan, torch.inf, 1e-45
    again_TL = unpack(pack(rows_TL, 16, torch.int8), 16)
    assert (again_TL[0] == 0).all() and (again_TL[3].abs() <= 1e-44).all()
    assert again_TL[1, :16].isnan().all() and again_TL[2, 17] == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_rows_are_stored_as_they_are(dtype: torch.dtype) -> None:
    rows_TL = torch.randn(3, 20)
    stored_TL = pack(rows_TL, 16, dtype)
    assert torch.equal(stored_TL, rows_TL.to(dtype)) and unpack(stored_TL, 16) is stored_TL


def test_the_planner_counts_the_same_bytes() -> None:
    for name in ("mid", "deepseek-v3", "demo", "nano"):
        config = preset(name)
        assert row_bytes(config, torch.int8) == cache_row_bytes(config, "fp8")
        assert row_bytes(config, torch.bfloat16) == cache_row_bytes(config, "bf16")
    assert row_bytes(preset("deepseek-v3"), torch.int8) == 656


def test_models_without_latents_and_other_names_are_refused() -> None:
    plain = with_plain_attention(preset("demo"), 2)
    assert cache_dtype(plain, torch.bfloat16) == torch.bfloat16
    with pytest.raises(UserError, match="latent attention alone"):
        cache_dtype(plain, torch.bfloat16, "int8")
    with pytest.raises(UserError, match="auto, int8"):
        cache_dtype(small_config(), torch.bfloat16, "fp8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="auto, int8"):
        Engine(random_model(small_config()), cache="int4")  # type: ignore[arg-type]


def test_both_forms_read_the_same_rows() -> None:
    config = small_config()
    model, source = random_model(config), torch.Generator().manual_seed(1)
    tokens_T, positions_T = torch.randint(config.vocab_size, (30,), generator=source), torch.arange(30)
    found = []
    with torch.inference_mode():
        for form in (attend.absorbed, attend.expanded):
            cache = LatentCache(config, 30, torch.int8)
            hidden_TD, _ = model(tokens_T[:20], positions_T[:20], cache.at(0, form), GroupedDispatch())
            more_TD, _ = model(tokens_T[20:], positions_T[20:], cache.at(20, form), GroupedDispatch())
            found.append(torch.cat([hidden_TD, more_TD]))
        exact_TD, _ = model(tokens_T, positions_T, LatentCache(config, 30, torch.float32).at(0), GroupedDispatch())
    torch.testing.assert_close(*found, atol=2e-2, rtol=2e-2)  # a last bit may decide between two integers
    error = (found[0] - exact_TD).norm() / exact_TD.norm()
    assert 1e-4 < error < 3e-2


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "sampled"])
def test_drafts_and_company_change_nothing(sampling: Sampling) -> None:
    """Natively a row is a function of its past alone, and so is what it is rounded to."""
    config = small_config(num_nextn_predict_layers=2)
    model = drafting_model(config, seed=2, surprise=0.25).bfloat16()
    native_view(model)
    source = random.Random(0)
    prompts = [[source.randrange(config.vocab_size) for _ in range(source.randrange(1, 30))] for _ in range(12)]
    how: dict[str, Any] = {"max_new_tokens": 24, "sampling": sampling}
    alone = [list(TokenStream(model, prompt, drafts=0, cache="int8", **how)) for prompt in prompts]
    drafted = [TokenStream(model, prompt, drafts=2, cache="int8", **how) for prompt in prompts]
    assert [list(stream) for stream in drafted] == alone
    assert sum(sum(stream.stats.accepted) for stream in drafted) > 0
    engine = Engine(model, memory=60 * page_bytes(config, 4, torch.int8), page=4, budget=32, most=8, cache="int8")
    assert engine.cache.rows_MZW.dtype == torch.int8
    made = [engine.submit(Request(prompt, **how))[0] for prompt in prompts]
    engine.run()
    assert [generation.tokens for generation in made] == alone
    assert engine.totals.preempted > 0


@pytest.mark.parametrize("number", [0, 5, 15, 17])
def test_no_number_in_a_row_is_heard(number: int) -> None:
    """Of a latent (16) or a rotary key, natively and plainly."""
    config = small_config()
    model = random_model(config)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        if number < 16:
            attention.get_parameter("kv_a_layernorm.weight")[number] = torch.nan
        else:
            attention.get_parameter("kv_a_proj_with_mqa.weight")[number] = torch.nan
    native_view(model)
    with pytest.raises(UserError, match="NaN"):
        list(TokenStream(model, [1, 2, 3], cache="int8"))
    with plain_only(), pytest.raises(UserError, match="NaN"):
        list(TokenStream(model, [1, 2, 3], cache="int8"))


def test_the_same_memory_holds_more() -> None:
    model = random_model(preset("mid").replace(num_hidden_layers=1, vocab_size=64, n_routed_experts=None), 0)
    model = model.bfloat16()
    pages = [Engine(model, memory=1 << 22, cache=cache).load.pages for cache in ("auto", "int8")]
    assert pages[1] / pages[0] == pytest.approx(1152 / 656, rel=0.02)
