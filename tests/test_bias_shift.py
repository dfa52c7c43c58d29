"""Biases shifted for export: the same routing, and engines that mask with 0.0 then route like ours.

Letters: T tokens, E experts, G groups of X experts, K experts a token, D hidden size.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.model.router import Router, choose, gate_weights, group_scores
from cavelight.spec.config import ModelConfig
from cavelight.weights.bias import for_export, shifted
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .reference.ours import our_model
from .reference.random_weights import random_weights
from .reference.tiny import some_tokens, tiny

T, D = 16, 32
GROUPED = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
EPS = torch.finfo(torch.float32).eps


def config_of(experts: int, groups: int, kept: int, chosen: int) -> ModelConfig:
    return tiny(n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=chosen)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    groups, size = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 4, 8]))
    kept = draw(st.integers(1, groups))
    return config_of(groups * size, groups, kept, draw(st.integers(1, min(4, kept * size))))


def dyadic(*shape: int, low: int, high: int, seed: int) -> Tensor:
    """Multiples of 2^-10, whose sums float32 holds exactly; coarse enough that many are equal."""
    drawn = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    return drawn / 1024


@given(config=configs(), seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([4, 256, 4096]))
@settings(max_examples=150, deadline=None)
def test_without_rounding_routing_is_the_same(config: ModelConfig, seed: int, spread: int) -> None:
    """Experts, their order and their weights, ties included."""
    E = config.n_routed_experts or 0
    scores_TE = dyadic(T, E, low=1, high=1024, seed=seed)
    bias_E = dyadic(E, low=-spread, high=spread, seed=seed + 1)
    before_TK, after_TK = choose(scores_TE, bias_E, config), choose(scores_TE, shifted(bias_E), config)
    assert torch.equal(before_TK, after_TK)
    weights_TK = [gate_weights(scores_TE.gather(1, ids_TK), config) for ids_TK in (before_TK, after_TK)]
    assert torch.equal(*weights_TK)


def nearest(values_TN: Tensor) -> Tensor:
    """The smallest distance between two of each token's values, [T]."""
    ordered_TN = values_TN.double().sort(dim=1).values
    return (ordered_TN[:, 1:] - ordered_TN[:, :-1]).amin(dim=1) if values_TN.shape[1] > 1 else torch.full((T,), 9.0)


@given(config=configs(), seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 0.3, 2.0, 20.0]))
@settings(max_examples=150, deadline=None)
def test_with_rounding_only_what_is_closer_than_rounding_may_change(
    config: ModelConfig, seed: int, scale: float
) -> None:
    """The real router, on arbitrary weights, inputs and biases; compared are tokens without such a near-tie."""
    generator = torch.Generator().manual_seed(seed)
    E = config.n_routed_experts or 0
    router = Router(config, torch.float32, None)
    bias_E = router.e_score_correction_bias
    assert bias_E is not None
    torch.nn.init.normal_(router.weight, std=0.3, generator=generator)
    bias_E.normal_(std=scale, generator=generator)
    x_TD = torch.randn(T, D, generator=generator)
    with torch.no_grad():
        before = router(x_TD)
        choice_TE = before.scores_TE + bias_E
        bias_E.copy_(shifted(bias_E))
        after = router(x_TD)
    assert float(bias_E.min()) == 0
    rounding = 8 * EPS * float(1 + bias_E.abs().max())
    distances_T = nearest(choice_TE)
    if config.n_group > 1:
        groups_TG = group_scores(choice_TE.unflatten(1, (config.n_group, -1)), config)
        distances_T = torch.minimum(distances_T, nearest(groups_TG))
    clear_T = distances_T > rounding
    assert torch.equal(before.ids_TK[clear_T], after.ids_TK[clear_T])
    assert torch.equal(before.weights_TK[clear_T], after.weights_TK[clear_T])
    assert torch.equal(before.scores_TE, after.scores_TE)
    assert scale == 20.0 or E > 16 or int(clear_T.sum()) > T // 2  # near-ties are rare, so most tokens were compared


def masked_with_zero(scores_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> Tensor:
    """What some engines do, [T, K]: experts of groups that are out score 0.0, not -inf."""
    choice_TGX = (scores_TE + bias_E).unflatten(1, (config.n_group, -1))
    best_TG = choice_TGX.topk(2, dim=-1).values.sum(dim=-1)
    kept_TM = best_TG.topk(config.topk_group, dim=-1).indices
    mask_TG1 = torch.zeros_like(best_TG).scatter_(1, kept_TM, 1.0)[..., None]
    return (choice_TGX * mask_TG1).flatten(1).topk(config.num_experts_per_tok, dim=-1).indices


def test_engines_that_mask_with_zero_go_wrong_before_and_agree_after() -> None:
    config = tiny(**GROUPED)
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.randn(500, 8, generator=generator).sigmoid()
    bias_E = torch.tensor([-0.9, -0.7, -0.8, -0.6, -0.9, -0.8, -0.5, -0.7])
    ours_TK = choose(scores_TE, bias_E, config)
    theirs_TK = masked_with_zero(scores_TE, bias_E, config)
    wrong = (ours_TK.sort().values != theirs_TK.sort().values).any(dim=1)
    assert int(wrong.sum()) > 100  # they take experts of groups that are out
    assert torch.equal(masked_with_zero(scores_TE, shifted(bias_E), config), ours_TK)


def test_when_biases_are_shifted() -> None:
    negative, positive = torch.tensor([0.25, -0.5, 1.0]), torch.tensor([2.5, 2.0, 3.0])
    assert for_export(negative).tolist() == [0.75, 0.0, 1.5]
    assert for_export(negative, False) is negative
    assert for_export(positive) is positive
    assert for_export(positive, True).tolist() == [0.5, 0.0, 1.0]
    assert for_export(negative.bfloat16(), False).dtype == torch.float32


@pytest.mark.parametrize("shift", [None, True, False])
def test_what_we_save_is_shifted_unless_told(tmp_path: Path, shift: bool | None) -> None:
    """Each layer by its own constant, MTP's too; the model in memory keeps its biases, and tokens their experts."""
    config = tiny(num_nextn_predict_layers=1, num_hidden_layers=3, **GROUPED)
    model = our_model(config, random_weights(config))
    before = {name: bias.clone() for name, bias in model.named_buffers()}
    tokens_T = torch.tensor(some_tokens(config, 40))
    logits_TV = model.logits(tokens_T)
    write_checkpoint(model, tmp_path / "out", shift_biases=shift)
    read = read_checkpoint(tmp_path / "out")
    assert len(before) == 3 and all(torch.equal(bias, before[name]) for name, bias in model.named_buffers())
    for name, bias_E in read.named_buffers():
        assert torch.equal(bias_E, before[name] if shift is False else shifted(before[name]))
    assert torch.equal(read.logits(tokens_T), logits_TV)
