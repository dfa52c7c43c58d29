"""How many drafts pay: what steps cost against tokens, how many drafts were kept, and in which company."""

from collections.abc import Callable

import pytest

from cavelight.run.pace import AGAIN, Chances, Pace
from cavelight.run.request import Request

from .engines import engine_of, model_of
from .run_models import small_config


def pace_of(seconds: Callable[[int], float], drafting: float = 0.0, modules: int = 1) -> Pace:
    """One that has seen steps of several sizes; a draft takes `drafting`."""
    pace = Pace(small_config(num_nextn_predict_layers=modules))
    for tokens in (1, 2, 4, 8) * 3:
        pace.note(tokens, seconds(tokens), 2, 2 * drafting)
    return pace


def test_chances_are_those_of_the_rounds_and_never_grow_with_depth() -> None:
    chances = Chances(3)
    assert chances.all() == [0.5, 0.25, 0.125]
    for _ in range(300):
        chances.note(3, 1)
    assert chances.all() == pytest.approx([1, 0, 0], abs=0.02)
    for _ in range(300):
        chances.note(1, 0)  # deeper ones are not heard of, but cannot be likelier
    first, second, third = chances.all()
    assert third <= second <= first < 0.01
    kept = Chances(2)
    for _ in range(100):
        kept.note(2, 2)
        kept.note(1, 0)
    assert kept.proposed[1] < kept.proposed[0] and kept.all()[1] == kept.all()[0] == pytest.approx(0.5, abs=0.02)


def test_where_reading_takes_the_time_all_drafts_pay() -> None:
    assert pace_of(lambda tokens: 1.0).drafts(Chances(4), 10, company=1) == 4


def test_where_every_token_costs_as_much_none_does_but_for_a_try_now_and_then() -> None:
    pace = pace_of(lambda tokens: float(tokens))
    assert [pace.drafts(Chances(4), tokens, company=1) for tokens in (1, AGAIN - 1, AGAIN, AGAIN + 1)] == [0, 0, 1, 0]


def test_company_shares_the_reading_but_not_the_tokens() -> None:
    pace = pace_of(lambda tokens: 1 + 0.1 * tokens)
    assert pace.drafts(Chances(4), 10, company=1) > 0 == pace.drafts(Chances(4), 10, company=32)


def test_what_a_draft_takes_to_make_counts() -> None:
    assert pace_of(lambda tokens: 1.0, drafting=0.3).drafts(Chances(4), 10, company=1) == 1
    assert pace_of(lambda tokens: 1.0, drafting=0.6).drafts(Chances(4), 10, company=1) == 0


def test_as_long_as_nothing_is_known_both_are_tried() -> None:
    for modules in (1, 2):
        pace = Pace(small_config(num_nextn_predict_layers=modules))
        assert [pace.drafts(Chances(4), tokens, company=1) for tokens in (1, 2, 3)] == [modules, 0, modules]
        for _ in range(50):
            pace.note(4, 1.0, 0, 0.0)  # steps of one size say nothing about another
        assert pace.drafts(Chances(4), 1, company=1) == modules
    assert Pace(small_config(num_nextn_predict_layers=0)).drafts(Chances(0), 1, company=1) == 0


def test_only_steps_in_which_all_decode_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, heard = engine_of(model_of(1), budget=8, most=4), list[int]()
    monkeypatch.setattr(engine.pace, "note", lambda tokens, seconds, guesses, drafting: heard.append(tokens))
    engine.submit(Request([*range(20)], 5, drafts=0))
    engine.run()
    assert heard == [1] * 4 and engine.totals.steps == 7
