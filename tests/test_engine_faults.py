"""The engine: errors, cancelling and what makes no sense end or refuse one request, and leave all others alone."""

import random
from collections.abc import Sequence
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.run import request as request_module
from cavelight.run.engine import Engine
from cavelight.run.generate import generate_tokens
from cavelight.run.request import Generation, Request

from .crowds import V, alone
from .engines import LIMIT, engine_of, model_of
from .run_models import random_model, small_config


def broken(tokens: Sequence[int]) -> Tensor | None:
    if len(tokens) > 6:
        raise ZeroDivisionError
    return None


BROKEN = {
    "nothing allowed": (lambda tokens: torch.zeros(V, dtype=torch.bool) if len(tokens) > 6 else None, UserError),
    "a mask that is none": (lambda tokens: [True] * V if len(tokens) > 6 else None, UserError),
    "a mask too short": (lambda tokens: torch.ones(3, dtype=torch.bool) if len(tokens) > 6 else None, UserError),
    "a hook's own": (broken, ZeroDivisionError),
}


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("kind", BROKEN)
def test_an_error_ends_its_own_generations_alone(kind: str, drafts: int) -> None:
    hook, error = BROKEN[kind]
    engine = engine_of(model_of(1))
    others = engine.submit(Request([1, 2], 8, samples=3))
    bad = engine.submit(Request([1, 2, 3], 8, allowed=hook, samples=2, drafts=drafts))
    late = engine.submit(Request([7, 7], 9, drafts=2))
    engine.run()
    for sample, generation in enumerate([*others, *late]):
        assert generation.tokens == alone(engine.model, generation.request, sample)
    for generation in bad:
        assert len(generation.tokens) == 4 and generation.stats.finish == "error"
        with pytest.raises(error):
            list(generation)
    assert engine.load.pages_held == engine.load.running == 0


def test_an_error_at_the_end_of_a_prompt_leaves_the_samples_of_others() -> None:
    def at_once(tokens: Sequence[int]) -> Tensor | None:
        raise RuntimeError

    engine = engine_of(model_of(1))
    good = engine.submit(Request([4, 2, 1], 8, samples=3))
    bad = engine.submit(Request([1, 2, 3], 8, samples=2, allowed=at_once))
    engine.run()
    assert [generation.tokens for generation in good] == [alone(engine.model, good[0].request)] * 3
    assert [generation.stats.finish for generation in bad] == ["error", "error"] and engine.load.pages_held == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_step_that_was_broken_off_is_the_last(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """What would come after it could be wrong without a word."""
    engine = engine_of(model_of(1))
    (mine,) = engine.submit(Request([1, 2], 8))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.drafter, "propose", lambda wishes: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            engine.run()
    for again in (engine.run, lambda: list(mine), lambda: engine.submit(Request([1]))):
        with pytest.raises(UserError, match=rf"broken off in the middle of a step. Got: {error.__name__}"):
            again()


def test_a_hook_that_calls_the_engine_is_told_so() -> None:
    engine = engine_of(model_of(1))

    def calls(tokens: Sequence[int]) -> None:
        engine.step()

    (bad,), (good,) = engine.submit(Request([1], 4, allowed=calls)), engine.submit(Request([2], 4))
    with pytest.raises(UserError, match="A hook called the engine"):
        list(bad)
    assert list(good) == alone(engine.model, good.request)


def test_a_hook_may_spoil_what_it_is_given() -> None:
    def spoils(tokens: Sequence[int]) -> None:
        assert isinstance(tokens, list)
        tokens.clear()

    engine = engine_of(model_of(1))
    made = [*engine.submit(Request([4, 2, 1], 8, allowed=spoils, drafts=3, samples=2)), *engine.submit(Request([2], 8))]
    engine.run()
    for generation in made:
        assert generation.tokens == generate_tokens(engine.model, generation.prompt, 8, mtp=False)


def test_nan_in_a_module_ends_one_generation() -> None:
    model = model_of(1)
    model.mtp[0].norm.weight.data.fill_(torch.nan)
    engine = engine_of(model)
    (drafting,), (plain,) = engine.submit(Request([1], 6, drafts=1)), engine.submit(Request([2], 6, drafts=0))
    engine.run()
    assert plain.tokens == alone(model, plain.request) and drafting.stats.finish == "error"
    with pytest.raises(UserError, match="NaN"):
        list(drafting)


def test_cancelling_from_another_thread_at_any_moment() -> None:
    """Also between two lines of the step that has just decided something."""
    engine = engine_of(model_of(1), pages=200, most=8)
    (mine,), (other,) = engine.submit(Request([1, 2], 40)), engine.submit(Request([3], 12))
    for _ in range(3):
        engine.step()
    cut = request_module.cut

    def slow(*arguments: Any) -> Any:
        thread = Thread(target=mine.cancel)
        thread.start()
        thread.join(0.05)  # it waits for the step to write down what was decided
        return cut(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_module, "cut", slow)
        engine.step()
    engine.run()
    assert mine.stats.finish == "cancelled" and mine.tokens == alone(engine.model, mine.request)[: len(mine.tokens)]
    assert list(mine) == mine.tokens and other.tokens == alone(engine.model, other.request)
    assert engine.load.pages_held == 0


@pytest.mark.parametrize("moment", range(10, 30))
def test_cancelling_whenever_the_clock_is_read(moment: int) -> None:
    """Also right before a decided token is written down."""
    ticks = iter(range(10**6))

    def clock() -> float:
        now = next(ticks)
        if now == moment:
            mine.cancel()
        return float(now)

    engine = engine_of(model_of(1), clock=clock)
    (mine,) = engine.submit(Request([1, 2, 3], 30, drafts=1))
    engine.run()
    assert mine.stats.finish == "cancelled" and list(mine) == mine.tokens and engine.load.pages_held == 0


@pytest.mark.parametrize("length", [3, 4, 6])
def test_cancelling_while_the_next_token_is_chosen(length: int) -> None:
    engine = engine_of(model_of(1))

    def cancels(tokens: Sequence[int]) -> None:
        if len(tokens) == length:
            mine.cancel()

    (mine,), (other,) = engine.submit(Request([1, 2, 3], 9, allowed=cancels, drafts=2)), engine.submit(Request([2], 9))
    engine.run()
    assert mine.stats.finish == "cancelled" and len(mine.tokens) <= length - 3 and list(mine) == mine.tokens
    assert other.tokens == alone(engine.model, other.request) and engine.load.pages_held == 0


def test_threads_may_ask_and_cancel_while_another_works() -> None:
    engine, made = engine_of(model_of(1), pages=100, most=8), list[Generation]()

    def asks(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(12):
            (generation,) = engine.submit(Request([source.randrange(V)], source.randrange(1, 20), drafts=1))
            made.append(generation)
            if source.random() < 0.3:
                source.choice(made).cancel()

    threads = [Thread(target=asks, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.step():
        engine.step()
    for generation in made:
        expected = alone(engine.model, generation.request)
        assert generation.stats.finish and generation.tokens == expected[: len(generation.tokens)]
        assert generation.stats.finish == "cancelled" or generation.tokens == expected
    assert engine.load.pages_held == 0


def test_cancelling_the_first_sample_leaves_the_others() -> None:
    engine = engine_of(model_of(1), budget=4, most=4)
    made = engine.submit(Request([*range(10)], 6, samples=3))
    engine.step()
    made[0].cancel()
    engine.run()
    assert [generation.stats.finish for generation in made] == [
        "cancelled",
        "limit of new tokens",
        "limit of new tokens",
    ]
    expected = alone(engine.model, made[1].request)
    assert made[0].tokens == [] and [generation.tokens for generation in made[1:]] == [expected] * 2


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("moment", ["while it waits", "in its prompt"])
def test_a_sample_that_has_ended_leaves_its_place(moment: str, which: int) -> None:
    engine = engine_of(model_of(1), budget=4, most=2)
    made = engine.submit(Request([*range(10)], 20, samples=2))
    if moment == "in its prompt":
        engine.step()
    ended, other = made[which], made[1 - which]
    ended.cancel()
    (late,) = engine.submit(Request([1], 4))
    while not late.stats.finish:
        engine.step()
    assert not other.stats.finish and ended.tokens == []
    engine.run()
    assert [each.tokens for each in (other, late)] == [alone(engine.model, each.request) for each in (other, late)]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request([]), "prompt is empty"),
        (Request([10**6]), "unknown token ids"),
        (Request("text"), "no list of token ids. Got: 'text'"),  # type: ignore[arg-type]
        (Request([1, 2.5]), "no list of token ids"),  # type: ignore[list-item]
        (Request(7), "no list of token ids. Got: 7"),  # type: ignore[arg-type]
        (Request([1] * (LIMIT + 1)), "longer than the context"),
        (Request([1] * 30, 30), "does not fit into the engine"),
        (Request([1], 5, samples=99), "too many samples"),
        (Request([1], 5, drafts=-1), "negative"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(request_: Request, says: str) -> None:
    model = random_model(small_config(max_position_embeddings=LIMIT, bos_token_id=None))
    with pytest.raises(UserError, match=says):
        engine_of(model, pages=10).submit(request_)


def test_drafts_without_measure_are_as_many_as_fit() -> None:
    engine = engine_of(model_of(1), budget=8, most=4)
    made = [*engine.submit(Request([1, 2], 20, drafts=10**30)), *engine.submit(Request([3], 20, drafts=0))]
    most = 0
    while engine.step():
        most = max(most, *(len(generation.guesses) for generation in made))
    assert most in (6, 7)  # beside the other's token, or alone
    assert [generation.tokens for generation in made] == [alone(engine.model, each.request) for each in made]


def test_those_who_wait_take_no_drafts_away() -> None:
    engine = engine_of(model_of(1), budget=8, most=1)
    (mine,) = engine.submit(Request([1, 2], 20, drafts=4))
    waiting = [engine.submit(Request([token], 1))[0] for token in range(20)]
    most = 0
    while not mine.stats.finish:
        engine.step()
        most = max(most, len(mine.guesses))
    assert most == 4 and not any(generation.tokens for generation in waiting)


def test_a_full_queue_refuses() -> None:
    engine = engine_of(model_of(0), queue=2)
    engine.submit(Request([1]))
    engine.submit(Request([1]))
    with pytest.raises(UserError, match="full"):
        engine.submit(Request([1]))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 2.5},
        {"max_new_tokens": -1},
        {"samples": 0},
        {"priority": None},
        {"client": 3},
        {"likeliest": -1},
        {"drafts": "many"},
        {"stop_ids": {"end"}},
        {"stop_ids": 7},
        {"allowed": 3},
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"request cannot be used.*{next(iter(options))} = "):
        Request([1], **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": 100}, "memory is too small"),
        ({"memory": 1e6}, "memory = 1000000.0"),
        ({"memory": 1 << 60}, "Memory is too small to hold the engine's cache"),
        ({"most": 0}, "most = 0"),
        ({"page": 0}, "page = 0"),
        ({"queue": 0}, "queue = 0"),
        ({"budget": 3, "most": 4}, "budget is too small"),
    ],
)
def test_an_engine_that_cannot_work_is_not_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Engine(model_of(0), **options)
