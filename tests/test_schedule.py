"""The course of a run: the report's figures at their tokens, any part of its schedule, and the ramp of the batch."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cavelight.spec.recipe import Recipe
from cavelight.spec.sections import Stage, TrainSection
from cavelight.train.schedule import bias_speed, learning_rate, mtp_weight, rows

V3 = TrainSection(
    rows_per_step=15360,
    rows_per_microbatch=16,
    ramp_from_rows=3072,
)
LATE = 10**6  # a step beyond any warm-up
TRILLIONS = 14.8


def at(tokens: float) -> float:
    """The V3 report's learning rate after so many trillions of tokens."""
    return learning_rate(V3, LATE, tokens / TRILLIONS)


def test_the_default_is_the_reports_learning_rate() -> None:
    """2.2e-4 to 10T tokens, a cosine to 2.2e-5 over 4.3T, 333B at 2.2e-5, 167B at 7.3e-6."""
    assert [at(tokens) for tokens in (0, 1, 5, 9.999)] == [2.2e-4] * 4
    assert at(10.0) == pytest.approx(2.2e-4)
    for done in (0.1, 0.5, 0.9):
        cosine = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * done)) / 2
        assert at(10 + 4.3 * done) == pytest.approx(cosine)
    assert at(14.2999) == pytest.approx(2.2e-5, rel=1e-4)
    assert [at(tokens) for tokens in (14.3001, 14.5, 14.6329)] == pytest.approx([2.2e-5] * 3)
    assert [at(tokens) for tokens in (14.6331, 14.7, 14.8, 15)] == pytest.approx([7.3e-6] * 4)


def test_the_warm_up_is_linear_by_steps_and_ends_at_the_peak() -> None:
    rates = [learning_rate(V3, step, step / 1e6) for step in range(2001)]
    assert rates[0] == pytest.approx(2.2e-4 / 2000)
    assert rates[1999] == rates[2000] == pytest.approx(2.2e-4)
    assert all(b - a == pytest.approx(2.2e-4 / 2000) for a, b in pairwise(rates[:2000]))


def test_other_parts_of_the_run_change_where_the_report_says() -> None:
    """lambda 0.3 for 10T tokens, then 0.1; gamma 0.001 for 14.3T, then 0."""
    assert [mtp_weight(V3, tokens / TRILLIONS) for tokens in (0, 9.99, 10.01, 14.8)] == [0.3, 0.3, 0.1, 0.1]
    assert [bias_speed(V3, tokens / TRILLIONS) for tokens in (0, 14.29, 14.31, 14.8)] == [1e-3, 1e-3, 0, 0]
    always = V3.model_copy(update={"bias_until": 1.0, "mtp_late_from": 1.0})
    assert (bias_speed(always, 0.9999), mtp_weight(always, 0.9999)) == (1e-3, 0.3)


def test_the_batch_grows_as_the_reports_does() -> None:
    """3072 to 15360 sequences over the first 469B tokens."""
    assert rows(V3, 0.0) == 3072
    assert rows(V3, 0.469 / 2 / TRILLIONS) == pytest.approx((3072 + 15360) / 2, rel=0.002)
    assert [rows(V3, tokens / TRILLIONS) for tokens in (0.47, 5, 14.8)] == [15360] * 3


def test_without_a_ramp_every_step_is_whole() -> None:
    plain = V3.model_copy(update={"ramp_from_rows": None})
    assert {rows(plain, n / 1000) for n in range(1001)} == {15360}
    assert rows(V3.model_copy(update={"ramp_share": 0.0}), 0.0) == 15360


@given(
    first=st.integers(1, 20),
    more=st.integers(0, 20),
    unit=st.integers(1, 7),
    share=st.floats(0.001, 1.0),
    progress=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=9).map(sorted),
)
def test_a_ramp_grows_in_whole_micro_batches(
    first: int, more: int, unit: int, share: float, progress: list[float]
) -> None:
    recipe = TrainSection(
        rows_per_step=(first + more) * unit,
        rows_per_microbatch=unit,
        ramp_from_rows=first * unit,
        ramp_share=share,
    )
    grown = [rows(recipe, p) for p in progress]
    assert grown == sorted(grown)
    assert all(n % unit == 0 and first * unit <= n <= recipe.rows_per_step for n in grown)
    assert rows(recipe, 0.0) == first * unit and rows(recipe, share) == recipe.rows_per_step


stages = st.lists(
    st.builds(
        Stage,
        share=st.floats(0.01, 1.0),
        to=st.floats(0.0, 2.0),
        shape=st.sampled_from(["constant", "cosine", "linear"]),
    ),
    min_size=1,
    max_size=6,
)


@given(stages)
def test_a_schedule_goes_where_its_stages_say(given_stages: list[Stage]) -> None:
    """Within a stage between the two heights, at its end at the later one, and smooth ones begin where they stand."""
    total = sum(stage.share for stage in given_stages)
    schedule = tuple(stage.model_copy(update={"share": stage.share / total}) for stage in given_stages)
    recipe = TrainSection(learning_rate=1.0, warmup_steps=0, schedule=schedule)
    begin, before = 0.0, 1.0
    for stage in schedule:
        heights = [learning_rate(recipe, LATE, begin + stage.share * part) for part in (1e-9, 0.3, 0.5, 0.7, 1 - 1e-9)]
        assert all(min(before, stage.to) - 1e-6 <= h <= max(before, stage.to) + 1e-6 for h in heights)
        assert heights[-1] == pytest.approx(stage.to, abs=1e-6)
        assert heights[2] == pytest.approx(stage.to if stage.shape == "constant" else (before + stage.to) / 2, abs=1e-6)
        if stage.shape != "constant":
            assert heights[0] == pytest.approx(before, abs=1e-6)
        begin, before = begin + stage.share, stage.to
    assert learning_rate(recipe, LATE, 1.0) == pytest.approx(before)


def test_the_recipe_v3_is_the_report_in_steps() -> None:
    """Its shares are of steps, the report's figures of tokens: going through all steps must meet both."""
    recipe = Recipe.read("v3")
    train, length = recipe.train, recipe.data.row_length
    assert train.steps is not None
    at_tokens: dict[float, tuple[float, float, float]] = {}
    wanted, tokens = [0.2, 9.99, 10.01, 12.15, 14.29, 14.31, 14.62, 14.64, 14.79], 0.0
    for step in range(train.steps):
        progress = step / train.steps
        tokens += rows(train, progress) * length / 1e12
        if wanted and tokens >= wanted[0]:
            at_tokens[wanted.pop(0)] = (
                learning_rate(train, step, progress),
                mtp_weight(train, progress),
                bias_speed(train, progress),
            )
    assert tokens == pytest.approx(14.8, rel=1e-4)
    for told, (rate, further, speed) in at_tokens.items():
        assert rate == pytest.approx(at(told), rel=5e-3), told
        assert further == (0.3 if told < 10 else 0.1), told
        assert speed == (1e-3 if told < 14.3 else 0.0), told
    assert not wanted
