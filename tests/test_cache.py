"""The latent cache: any way of cutting a sequence into steps, in either form of attention, equals one forward pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.kernels import attend
from cavelight.model.layers import rotate
from cavelight.model.ports import GroupedDispatch
from cavelight.model.transformer import Transformer
from cavelight.run.cache import Form, LatentCache
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import cache_bytes_per_token

from .reference.tiny import V2, tiny, yarn
from .run_models import random_model, small_config

TOKENS = torch.randint(48, (18,), generator=torch.Generator().manual_seed(3))
CONFIGS = {
    "v3": small_config(),
    "no query compression": small_config(q_lora_rank=None, num_attention_heads=3),
    "yarn beyond its original length": small_config(rope_scaling=yarn(8)),
    "v2": tiny(V2),
}
MODELS = {name: random_model(config) for name, config in CONFIGS.items()}
FORMS = {"expanded": attend.expanded, "absorbed": attend.absorbed, "the cheaper": None}


def logits_in_steps(model: Transformer, steps: list[Tensor], cache: LatentCache, form: Form | None = None) -> Tensor:
    start, hidden = 0, []
    for tokens_T in steps:
        positions_T = torch.arange(start, start + len(tokens_T))
        hidden_TD, _ = model(tokens_T, positions_T, cache.at(start, form), GroupedDispatch())
        hidden.append(hidden_TD)
        start += len(tokens_T)
    return model.head(torch.cat(hidden))


def cache_for(config: ModelConfig, capacity: int = 4) -> LatentCache:
    return LatentCache(config, capacity, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["v2", "yarn beyond its original length"])
@given(cuts=st.sets(st.integers(1, 17)))
@settings(deadline=None, max_examples=8)
def test_any_split_gives_the_same_logits(name: str, form: str, cuts: set[int]) -> None:
    model = MODELS[name]
    with torch.inference_mode():
        steps = list(TOKENS.tensor_split(sorted(cuts)))
        logits_TV = logits_in_steps(model, steps, cache_for(model.config), FORMS[form])
        torch.testing.assert_close(logits_TV, model.logits(TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_one_by_one_equals_one_forward_pass(name: str) -> None:
    model = MODELS[name]
    logits_TV = logits_in_steps(model, list(TOKENS.split(1)), cache_for(model.config))
    torch.testing.assert_close(logits_TV, model.logits(TOKENS), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_rejected_draft_leaves_nothing_behind() -> None:
    model, cache = MODELS["v3"], cache_for(CONFIGS["v3"])
    logits_in_steps(model, [TOKENS[:10]], cache)
    for wrong in (TOKENS[:6], TOKENS[3:5]):
        model(wrong, torch.arange(10, 10 + len(wrong)), cache.at(10), GroupedDispatch())
    hidden_TD, _ = model(TOKENS[10:], torch.arange(10, 18), cache.at(10), GroupedDispatch())
    torch.testing.assert_close(model.head(hidden_TD), model.logits(TOKENS)[10:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_row_is_the_latent_after_its_norm_and_the_key_after_rope() -> None:
    model, config = MODELS["v3"], CONFIGS["v3"]
    cache = cache_for(config, 18)
    logits_in_steps(model, [TOKENS[:5], TOKENS[5:]], cache)
    layer = model.model.layers[0]
    x_TD = layer.input_layernorm(model.model.embed_tokens(TOKENS))
    c_TC, k_rope_TR = layer.self_attn.kv_a_proj_with_mqa(x_TD).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    k_rope_TR = rotate(k_rope_TR[:, None], model.rotary(torch.arange(18)))[:, 0]
    expected_TL = torch.cat([layer.self_attn.kv_a_layernorm(c_TC), k_rope_TR], dim=-1)
    torch.testing.assert_close(cache.rows_MSW[0, :18], expected_TL, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_pairs_turn_wherever_they_begin() -> None:
    """One token's key after a latent of odd width, one head's query after an odd width without position."""
    config = small_config(kv_lora_rank=15, qk_nope_head_dim=7, num_attention_heads=1, q_lora_rank=None)
    model, cache = random_model(config), cache_for(config, 18)
    whole_TV = logits_in_steps(model, [TOKENS], cache_for(config, 18))
    torch.testing.assert_close(logits_in_steps(model, list(TOKENS.split(1)), cache), whole_TV, atol=1e-4, rtol=1e-4)


def test_nothing_expanded_is_stored() -> None:
    config = small_config(num_nextn_predict_layers=2)
    cache = cache_for(config, 10)
    assert cache.bytes() == 10 * cache_bytes_per_token(config, bytes_per_element=4, mtp=True).mla
    assert [t.shape for t in vars(cache).values() if isinstance(t, Tensor)] == [(4, 10, 16 + 8)]


def test_the_form_is_chosen_by_cost_and_not_by_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("expanded", "absorbed"):
        plain = getattr(attend, name)
        monkeypatch.setattr(attend, name, lambda *args, name=name, plain=plain: taken.append(name) or plain(*args))
    q_nope, q_rope, k_up, v_up = torch.ones(64, 4, 8), torch.ones(64, 4, 8), torch.ones(4, 8, 16), torch.ones(4, 8, 16)
    expected = []
    for T in (1, 2, 5, 40):
        for start in (0, 1, 30, 900):
            cache, rows = cache_for(small_config(), 1024), torch.ones(T, 24)
            cache.rows_MSW.zero_()
            cache.at(start)(0, q_nope[:T], q_rope[:T], rows[:, :16], rows[:, 16:], k_up, v_up, 1.0)
            cheap = attend.absorbed_is_cheaper(T, start + T, 4, 8, 8, 8, 16)
            expected.append((T, "absorbed" if cheap else "expanded"))
    assert taken == [name for _, name in expected]
    assert {name for T, name in expected if T == 5} == {"absorbed", "expanded"}, "or nothing was shown here"


def test_it_grows_by_doubling_up_to_the_context_and_keeps_its_rows() -> None:
    cache = cache_for(small_config(max_position_embeddings=20), 3)
    first = cache.write(1, 0, torch.full((2, 24), 7.0)).clone()
    sizes = []
    for start in range(2, 20):
        cache.write(1, start, torch.zeros(1, 24))
        sizes.append(cache.rows_MSW.shape[1])
    assert sorted(set(sizes)) == [3, 6, 12, 20]
    assert torch.equal(cache.rows_MSW[1, :2], first)
    with pytest.raises(AssertionError, match="position 20 in a context of 20"):
        cache.reserve(21)
