"""Sampling: every filter against a naive twin and against transformers, ties, draws, mistakes."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cavelight.errors import UserError
from cavelight.run.choose import Chooser
from cavelight.run.sample import Sampling, distribution, draw, scores

from .chance import COMMON, SURELY_NOT, chi_square

FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, repetition_penalty=1.7),
    Sampling(temperature=1.0, repetition_penalty=0.6),
    Sampling(temperature=0.7, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
]


def some_logits(seed: int, V: int = 40) -> Tensor:
    return 3 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def naive(logits: Sequence[float], history: Sequence[int], sampling: Sampling) -> list[float]:
    """The definition of every filter, in plain Python."""
    values = dict(enumerate(logits))
    for token in set(history):
        penalty = sampling.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    values = {token: value / sampling.temperature for token, value in values.items()}
    if sampling.top_k:
        kth = sorted(values.values(), reverse=True)[: sampling.top_k][-1]
        values = {token: value for token, value in values.items() if value >= kth}
    if sampling.top_p < 1:
        kept, mass = [], 0.0
        for token, p in sorted(softmax(values).items(), key=lambda item: (-item[1], item[0])):
            if mass < sampling.top_p:
                kept.append(token)
            mass += p
        values = {token: values[token] for token in kept}
    probabilities = softmax(values)
    most = max(probabilities.values())
    left = {token: values[token] for token, p in probabilities.items() if p >= sampling.min_p * most}
    result = softmax(left)
    return [result.get(token, 0.0) for token in range(len(logits))]


def softmax(values: dict[int, float]) -> dict[int, float]:
    top = max(values.values())
    total = sum(math.exp(value - top) for value in values.values())
    return {token: math.exp(value - top) / total for token, value in values.items()}


def witness(logits_V: Tensor, history: Sequence[int], sampling: Sampling) -> Tensor:
    """The same by transformers' processors, in the order in which its `generate` applies them."""
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            TemperatureLogitsWarper(sampling.temperature),
            *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
            *([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
            *([MinPLogitsWarper(sampling.min_p)] if sampling.min_p > 0 else []),
        ]
    )
    return processors(torch.tensor([history]), logits_V.double()[None])[0].softmax(dim=0)


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_filters_equal_their_definition_and_transformers(sampling: Sampling) -> None:
    for seed in range(8):
        logits_V, history = some_logits(seed), [3, 7, 7, seed, 20]
        probs_V = distribution(logits_V, history, sampling)
        assert probs_V.tolist() == pytest.approx(naive(logits_V.tolist(), history, sampling), abs=1e-12)
        torch.testing.assert_close(probs_V, witness(logits_V, history, sampling), atol=1e-12, rtol=0)


def test_every_filter_changes_something() -> None:
    """Or the comparison above would show nothing."""
    plain = distribution(some_logits(0), [3, 7], Sampling(temperature=1.0))
    for sampling in FILTERS:
        if sampling not in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=1000)):
            assert (distribution(some_logits(0), [3, 7], sampling) - plain).abs().max() > 1e-4, sampling


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    st.floats(0.0, 5.0),
    st.integers(0, 40),
    st.floats(0.0, 1.0, exclude_min=True),
    st.floats(0.0, 1.0),
    st.floats(0.1, 3.0),
    st.data(),
)
@settings(deadline=None, max_examples=100)
def test_any_distribution_is_one_and_keeps_its_likeliest(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, data: st.DataObject
) -> None:
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=5))
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    probs_V = distribution(torch.tensor(logits), history, sampling)
    assert probs_V.isfinite().all() and (probs_V >= 0).all()
    assert probs_V.sum() == pytest.approx(1, abs=1e-9)
    assert probs_V[scores(torch.tensor(logits), history, sampling).argmax()] == probs_V.max() > 0


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits_V = torch.zeros(50)
    logits_V[[9, 17, 40]] = 2.0
    assert distribution(logits_V, [], Sampling()).tolist() == [float(token == 9) for token in range(50)]
    assert distribution(logits_V, [9], Sampling(repetition_penalty=1.1))[17] == 1


def test_top_p_cuts_equal_tokens_by_id_and_top_k_keeps_them() -> None:
    level = torch.zeros(4)
    assert distribution(level, [], Sampling(temperature=1.0, top_p=0.5)).tolist() == [0.5, 0.5, 0, 0]
    assert distribution(level, [], Sampling(temperature=1.0, top_k=2)).tolist() == [0.25] * 4


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert distribution(some_logits(1), [], Sampling(temperature=1e-300)).max() == 1


def test_the_penalty_counts_a_token_once() -> None:
    once = scores(some_logits(2), [5], Sampling(repetition_penalty=1.5))
    assert torch.equal(once, scores(some_logits(2), [5, 5, 5], Sampling(repetition_penalty=1.5)))


def test_draws_follow_the_probabilities() -> None:
    probs_V = distribution(some_logits(3, V=12), [], Sampling(temperature=1.5, top_k=8))
    for counts in (
        Counter(draw(probs_V, 5, position) for position in range(4000)),
        Counter(draw(probs_V, seed, 5) for seed in range(4000)),
    ):
        found = [counts[token] for token in range(12)]
        assert chi_square(found, probs_V.tolist()) > COMMON
    assert chi_square(found, distribution(some_logits(3, V=12), [], Sampling(temperature=1.0)).tolist()) < SURELY_NOT


def test_positions_of_a_seed_are_independent() -> None:
    half_V = torch.tensor([0.5, 0.5], dtype=torch.float64)
    pairs = Counter((draw(half_V, 1, n), draw(half_V, 1, n + 1)) for n in range(2000))
    assert chi_square([pairs[a, b] for a in (0, 1) for b in (0, 1)], [0.25] * 4) > COMMON


def test_a_seed_decides_and_none_does_not() -> None:
    logits_V = torch.zeros(1000)

    def ten(seed: int | None) -> list[int]:
        chooser = Chooser(Sampling(temperature=1.0, seed=seed))
        return [chooser.tokens(logits_V[None], [0] * n, [])[0][0] for n in range(10)]

    assert ten(4) == ten(4) != ten(5)
    assert ten(None) != ten(None)


@pytest.mark.parametrize(
    "mask", [[True] * 40, torch.ones(40), torch.ones(39, dtype=torch.bool)], ids=["list", "float", "short"]
)
def test_a_mask_of_another_form_is_refused(mask: object) -> None:
    with pytest.raises(UserError, match=r"mask of allowed tokens cannot be used.*40 booleans"):
        Chooser(Sampling(), lambda tokens: mask).tokens(some_logits(1)[None], [], [])


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        Sampling(temperature=-1, top_k=-2, top_p=0, min_p=2, repetition_penalty=0, seed=-1)
    for name in ("temperature = -1", "top_k = -2", "top_p = 0", "min_p = 2", "repetition_penalty = 0", "seed = -1"):
        assert name in error.value.got
    for wrong in (math.nan, math.inf):
        with pytest.raises(UserError, match="temperature"):
            Sampling(temperature=wrong)
    text: Any = "a lot"
    with pytest.raises(UserError) as error:
        Sampling(text, text, text, text, text, text)
    assert error.value.got.count(" = 'a lot'") == 6
    with pytest.raises(UserError, match=r"top_k = 2.5, seed = 1.5"):
        Sampling(1, 2.5, 1, 0, 2, 1.5)  # type: ignore[arg-type]  # whole numbers will do where numbers do


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "sampled"])
def test_nan_is_the_models_fault_and_said_so(bad: float, sampling: Sampling) -> None:
    with pytest.raises(UserError, match="produced NaN"):
        distribution(torch.tensor([0.0, bad, 1.0]), [], sampling)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=1, seed=3)], ids=["greedy", "sampled"]
)
def test_a_mask_binds_what_is_guessed(sampling: Sampling) -> None:
    logits_V = torch.tensor([3.0, 2.0, 1.0])
    for allowed in range(3):
        chooser = Chooser(sampling, lambda tokens, allowed=allowed: torch.arange(3) == allowed)
        assert chooser.guess(logits_V, []) == allowed
    assert Chooser(sampling, lambda tokens: torch.zeros(3, dtype=torch.bool)).guess(logits_V, []) is None


def test_a_guess_is_drawn_with_the_noise_of_its_position() -> None:
    """So a module that guesses the trunk's probabilities draws the trunk's token."""
    for seed in range(20):
        chooser, line = Chooser(Sampling(temperature=1.0, seed=seed)), list(range(seed))
        assert chooser.guess(some_logits(seed), line) == chooser.tokens(some_logits(seed)[None], line, [])[0][0]
