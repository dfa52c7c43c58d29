"""Checks of routers: the biases that balance, and the rows of the gate.

Letters: E experts, G groups, M experts of a group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.doctor.statistics import Statistics
from cavelight.doctor.weights import FEW, norm_names, trained
from cavelight.spec.config import ModelConfig
from cavelight.weights.headers import abbreviated

TINY = 1e-8  # of the median square of a gate's rows


def biases(case: Case, found: Statistics) -> Iterator[Finding]:
    """Traps 3 and 5: what the routing biases are, and what engines make of them."""
    values = {s.name: s.values for s in found.ending("e_score_correction_bias") if s.values is not None and not s.bad}
    if not values or case.config is None:
        return
    problems = [*_negative(values, case.config), *_lost(values, case, found), *_coarse(values, case)]
    problems += _unreachable(values, case.config)
    yield from problems
    if not problems:
        least, most = (float(end) for end in torch.cat([*values.values()]).aminmax())
        spread = max(float(bias_E.max() - bias_E.min()) for bias_E in values.values())
        yield passed(
            "routing-bias",
            f"Routing biases of {len(values)} layers lie between {least:.3g} and {most:.3g}, at most {spread:.3g} "
            "apart in a layer, and leave every expert within reach.",
            3,
            least=least,
            most=most,
            spread=spread,
        )


def _negative(values: dict[str, Tensor], config: ModelConfig) -> Iterator[Finding]:
    below = [name for name, bias_E in values.items() if float(bias_E.min()) < 0]
    if below and config.topk_group < config.n_group:
        least = min(float(values[name].min()) for name in below)
        yield warned(
            "routing-bias",
            f"Routing biases of {len(below)} layers are negative (down to {least:.3g}): engines that mask groups with "
            "0.0 instead of -inf choose masked experts; `cavelight convert` adds a constant that changes no choice.",
            3,
            layers=len(below),
            least=least,
        )


def _lost(values: dict[str, Tensor], case: Case, found: Statistics) -> Iterator[Finding]:
    zero = [name for name, bias_E in values.items() if not bias_E.any()]
    weights = {name: found.tensors[name] for name in norm_names(case) if name in found.tensors}
    if zero and trained(weights):
        yield warned(
            "routing-bias",
            f"Routing biases of {len(zero)} of {len(values)} layers are all 0 in a trained model: unless it was "
            "balanced without them they were lost on the way, and other experts are chosen now; compare with the "
            "original.",
            5,
            layers=zero[:100],
        )


def _coarse(values: dict[str, Tensor], case: Case) -> Iterator[Finding]:
    fine = {name for name, entry in (case.entries or {}).items() if entry.dtype == torch.float32}
    coarse = [
        name
        for name, bias_E in values.items()
        if name in fine and bias_E.unique().numel() > 2 and torch.equal(bias_E.bfloat16().float(), bias_E)
    ]
    if coarse:
        yield warned(
            "routing-bias",
            f"Routing biases of {len(coarse)} layers are float32 that went through bfloat16 ({coarse[0]}): what "
            "balancing had learnt finer than that is gone; take them from the original.",
            5,
            layers=len(coarse),
        )


def _unreachable(values: dict[str, Tensor], config: ModelConfig) -> Iterator[Finding]:
    if config.scoring_func != "sigmoid":
        return
    lost = {name: experts for name, bias_E in values.items() if (experts := unreachable(bias_E, config))}
    if lost:
        count = sum(map(len, lost.values()))
        name, experts = next(iter(lost.items()))
        first = abbreviated(list(map(str, experts)), FEW)
        yield warned(
            "reach",
            f"{count} experts in {len(lost)} layers can never be chosen ({name}: {first}), "
            "since scores lie between 0 and 1 and enough others are ahead by more than 1 in bias: the biases ran "
            "away; lower the speed of their update.",
            5,
            experts={name: experts[:100] for name, experts in list(lost.items())[:100]},
        )


def unreachable(bias_E: Tensor, config: ModelConfig) -> list[int]:
    """Experts that no token can choose under these biases, whatever its sigmoid scores.

    An expert ahead by 1 or more in bias beats another in any case. A group that is beaten so by as many groups as are
    kept is never kept; an expert of the others needs fewer than K such betters in its own group and in those of the
    other groups kept that have the fewest. A few unreachable ones may be missed, none is named falsely.
    """
    groups, kept = config.n_group, config.topk_group
    bias_GM = bias_E.double().reshape(groups, -1)
    betters_EG = (bias_GM[None] >= bias_E.double()[:, None, None] + 1).sum(-1)
    own_E = torch.arange(len(bias_E)) // bias_GM.shape[1]
    inside_E = betters_EG.gather(1, own_E[:, None])[:, 0]
    others_EG = betters_EG.scatter(1, own_E[:, None], torch.iinfo(torch.int64).max).sort(dim=1).values
    betters_E = inside_E + others_EG[:, : kept - 1].sum(1)
    best_G = bias_GM.topk(min(2, bias_GM.shape[1]), dim=1).values.sum(1)  # a group's score without any token's
    beaten_G = (best_G[None] >= best_G[:, None] + 2).sum(1) >= kept
    never_E = (betters_E >= config.num_experts_per_tok) | beaten_G[own_E]
    return torch.nonzero(never_E).flatten().tolist()


def gates(case: Case, found: Statistics) -> Iterator[Finding]:
    """Rows of the gate that are nothing, or twice the same."""
    empty: list[str] = []
    double: list[str] = []
    for summary in found.ending("mlp.gate.weight"):
        squares_E, sums_E = summary.squares_I, summary.sums_I
        if squares_E is None or sums_E is None or summary.bad or summary.is_constant or not squares_E.isfinite().all():
            continue
        empty += [f"{summary.name} row {e}" for e in torch.nonzero(squares_E <= TINY * squares_E.median()).flatten()]
        keys = list(zip(squares_E.tolist(), sums_E.tolist(), strict=True))
        first = {key: e for e, key in reversed(list(enumerate(keys)))}
        pairs = [(first[key], e) for e, key in enumerate(keys) if key[0] and first[key] < e]
        double += [f"{summary.name} rows {one} and {other}" for one, other in pairs]
    if empty:
        yield failed(
            "gate-rows",
            f"{len(empty)} gate rows are zero ({abbreviated(empty, FEW)}): their experts' scores are the same for "
            "all tokens; they were never written or died in training; compare with an earlier checkpoint.",
        )
    if double:
        yield warned(
            "gate-rows",
            f"{len(double)} gate rows repeat another ({abbreviated(double, FEW)}): those experts are always chosen "
            "together or not at all; a copy that was not trained since, or a mistake in conversion.",
        )
    if not empty and not double and any(found.ending("mlp.gate.weight")):
        yield passed("gate-rows", "Every expert has a gate row of its own.")


CHECKS = (biases, gates)
