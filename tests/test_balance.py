"""The balance losses against the reports' sums written out, what even and uneven loads make of them, and the biases.

Letters: T tokens, E experts, K experts a token, G devices.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.spec.presets import preset
from cavelight.train.balance import (
    Kind,
    Rows,
    Rules,
    balance_losses,
    counted,
    max_violation,
    routers,
    update_biases,
)

from .reference.tiny import V2, tiny

KINDS: tuple[Kind, ...] = ("sequence", "expert", "device", "communication", "batch")
CPU = torch.device("cpu")


def restated(kind: Kind, scores: Tensor, chosen: list[list[int]], rules: Rules) -> Tensor:
    """One row's loss, as the reports write it: T tokens' scores and the ids that each of them chose."""
    T, E, K = len(chosen), scores.shape[1], len(chosen[0])
    if rules.by_score and kind in ("sequence", "batch"):
        chosen = [sorted(range(E), key=row.__getitem__, reverse=True)[:K] for row in scores.tolist()]
    P = [sum(scores[t, i] / scores[t].sum() for t in range(T)) / T for i in range(E)]
    f = [E / (K * T) * sum(i in chosen[t] for t in range(T)) for i in range(E)]
    if kind in ("sequence", "expert", "batch"):
        return sum(f[i] * P[i] for i in range(E))
    on_device = [range(g * E // rules.devices, (g + 1) * E // rules.devices) for g in range(rules.devices)]
    total = torch.zeros(())
    for experts in on_device:
        sent = sum(any(i in experts for i in chosen[t]) for t in range(T))
        load = sum(f[i] for i in experts) / len(experts)
        if kind == "communication":
            load = rules.devices / (rules.reach * T) * sent
        total = total + load * sum(P[i] for i in experts)
    return total


def random_routing(tokens: int, experts: int, per_token: int, seed: int) -> Routing:
    """Ids that do not follow from the scores, as a bias may make them."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(tokens, experts, generator=generator) + 0.05
    ids_TK = torch.rand(tokens, experts, generator=generator).topk(per_token, dim=-1).indices
    return Routing(ids_TK, torch.ones(tokens, per_token), scores_TE.requires_grad_())


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    devices=st.sampled_from([1, 2, 4]),
    per_token=st.integers(1, 3),
    by_score=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_loss_and_its_gradient_equal_the_reports_sums(
    lengths: list[int], devices: int, per_token: int, by_score: bool, masked: bool, seed: int
) -> None:
    routing = random_routing(sum(lengths), 8, per_token, seed)
    rules = Rules(by_score, devices, reach=min(devices, per_token))
    keep_T = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    found = balance_losses(routing, KINDS, Rows.of(lengths, CPU), rules, keep_T)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    for kind in KINDS:
        wanted = torch.zeros(())
        for span in [range(sum(lengths))] if kind == "batch" else spans:
            kept = [t for t in span if keep_T is None or keep_T[t]]
            if kept:
                chosen = [routing.ids_TK[t].tolist() for t in kept]
                wanted = wanted + restated(kind, routing.scores_TE[kept], chosen, rules)
        torch.testing.assert_close(found[kind], wanted, atol=1e-5, rtol=1e-5, msg=kind)
        ours, theirs = (
            torch.autograd.grad(loss, routing.scores_TE, retain_graph=True, materialize_grads=True)[0]
            for loss in (found[kind], wanted + 0 * routing.scores_TE.sum())
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=kind)


@given(seed=st.integers(0, 100), cut=st.integers(1, 11))
@settings(deadline=None, max_examples=20)
def test_the_batch_loss_of_two_parts_adds_up_to_the_whole_and_so_does_its_gradient(seed: int, cut: int) -> None:
    whole, rules = random_routing(12, 8, 2, seed), Rules(True, 1, 1)
    keep_T = torch.arange(12) % 3 != 0
    counts_E = counted(whole, rules, keep_T)
    at_once = balance_losses(whole, ["batch"], Rows.of([12], CPU), rules, keep_T)["batch"]
    parts = []
    for part in (slice(0, cut), slice(cut, 12)):
        routing = Routing(whole.ids_TK[part], whole.weights_TK[part], whole.scores_TE[part])
        rows = Rows.of([len(routing.ids_TK)], CPU)
        parts.append(balance_losses(routing, ["batch"], rows, rules, keep_T[part], counts_E)["batch"])
    torch.testing.assert_close(parts[0] + parts[1], at_once)
    together, apart = (torch.autograd.grad(loss, whole.scores_TE)[0] for loss in (at_once, parts[0] + parts[1]))
    torch.testing.assert_close(together, apart)


def test_what_even_and_uneven_loads_cost() -> None:
    """Tokens that go to one expert on either of two devices; and tokens that all go to the same two on one device."""
    rules = Rules(by_score=False, devices=2, reach=2)

    def costs(ids_TK: Tensor) -> dict[Kind, float]:
        scores_TE = torch.full((8, 8), 0.01).scatter_(1, ids_TK, 0.47)
        made = balance_losses(Routing(ids_TK, torch.ones(8, 2), scores_TE), KINDS, Rows.of([8], CPU), rules)
        return {kind: round(float(loss), 5) for kind, loss in made.items()}

    assert costs(torch.tensor([[t % 4, 4 + t % 4] for t in range(8)])) == dict.fromkeys(KINDS, 1.0)
    # P of the two is 0.94, and 0.96 of their device; f is 4 for each, 2 for their device, 1 for what is sent there.
    uneven = {"sequence": 3.76, "expert": 3.76, "batch": 3.76, "device": 1.92, "communication": 0.96}
    assert costs(torch.tensor([[0, 1]] * 8)) == uneven


def test_nothing_wanted_is_nothing_computed() -> None:
    assert balance_losses(random_routing(4, 8, 2, 0), [], Rows.of([4], CPU), Rules(True, 3, 1)) == {}


def test_how_many_devices_a_token_reaches_at_most() -> None:
    """V2: 160 experts in 8 groups, 3 of which a token reaches with 6 experts (V2 report, section 2.2.2)."""
    v2 = tiny(
        V2, topk_method="group_limited_greedy", n_routed_experts=16, n_group=8, topk_group=3, num_experts_per_tok=6
    )
    assert Rules.of(v2, devices=8) == Rules(by_score=False, devices=8, reach=3)
    assert Rules.of(v2, devices=16).reach == 6
    assert Rules.of(v2, devices=2).reach == 2
    assert Rules.of(tiny(V2), devices=8) == Rules(by_score=False, devices=8, reach=3)
    assert Rules.of(tiny(), devices=8) == Rules(by_score=True, devices=8, reach=2)


@given(st.lists(st.lists(st.integers(0, 9), min_size=8, max_size=8), min_size=3, max_size=3), st.floats(0, 0.1))
@settings(deadline=None, max_examples=20)
def test_biases_rise_below_the_mean_load_and_fall_above(loads: list[list[int]], speed: float) -> None:
    model = Transformer(preset("nano"))
    layers = routers(model)
    for router in layers:
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias.fill_(0.25)
    update_biases(model, [torch.tensor(load) for load in loads], speed)
    for router, load in zip(layers, loads, strict=True):
        mean = Fraction(sum(load), len(load))
        signs = torch.tensor([float((mean > c) - (mean < c)) for c in load])
        assert router.e_score_correction_bias is not None
        torch.testing.assert_close(router.e_score_correction_bias, 0.25 + speed * signs)


def test_max_violation_is_the_busiest_experts_excess() -> None:
    assert max_violation(torch.tensor([3, 3, 3])) == 0
    assert max_violation(torch.tensor([6, 0, 0])) == 2
    assert max_violation(torch.tensor([4, 3, 2])) == pytest.approx(1 / 3)
    assert max_violation(torch.tensor([0, 0])) == 0
