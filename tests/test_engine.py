"""The engine: whatever company a request has, its output is what `generate` makes of it alone."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.model.ports import GroupedDispatch
from cavelight.model.transformer import Transformer
from cavelight.run import request as request_module
from cavelight.run.cache import LatentCache
from cavelight.run.engine import Engine, page_bytes
from cavelight.run.generate import generate_tokens
from cavelight.run.paged import PagedAttend, Span
from cavelight.run.request import Generation, Request
from cavelight.run.sample import Sampling, distribution
from cavelight.run.text import TextStream

from .chance import COMMON, SURELY_NOT, chi_square
from .crowds import V, alone, other_parity, some_prefixes, some_request
from .run_models import drafting_model, random_model, small_config

LIMIT = 64


def model_of(modules: int, dtype: torch.dtype = torch.float64) -> Transformer:
    """Drafts of it are often right. In float64 rounding decides nothing, so that outputs can be compared."""
    config = small_config(num_nextn_predict_layers=modules, max_position_embeddings=LIMIT)
    return drafting_model(config, seed=2, surprise=0.25).to(dtype)


def engine_of(model: Transformer, pages: int = 40, page: int = 4, **options: Any) -> Engine:
    """An engine that may write to no page which another holds, or which is known."""
    memory = pages * page_bytes(model.config, page, model.lm_head.weight.dtype)
    engine = Engine(model, memory=memory, page=page, **({"budget": 64, "most": 12} | options))
    at, pool = engine.cache.at, engine.scheduler.pages

    def watched(spans: Sequence[Span], alone: bool = False) -> PagedAttend:
        for span in spans:
            for number in range(span.start // page, -(-span.end // page)):
                assert pool.holders[span.pages[number]] == 1 and not pool.is_known(span.pages[number])
        return at(spans, alone)

    engine.cache.at = watched  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("modules", [0, 1, 2, 3])
def test_a_crowd_gets_what_each_would_get_alone(modules: int) -> None:
    model, source = model_of(modules), random.Random(modules)
    engine = engine_of(model, pages=24, budget=source.choice((9, 24)), most=6)
    prefixes = some_prefixes(source)
    asked: list[tuple[Request, list[Generation]]] = []
    for _ in range(60):
        request = some_request(source, prefixes, modules > 0)
        asked.append((request, engine.submit(request)))
        for _ in range(source.randrange(4)):
            engine.step()
        if source.random() < 0.15:
            source.choice(source.choice(asked)[1]).cancel()
    engine.run()
    assert engine.load.running == engine.load.waiting == engine.load.pages_held == 0
    cancelled = 0
    for request, made in asked:
        for sample, generation in enumerate(made):
            expected = alone(model, request, sample)
            if generation.stats.finish == "cancelled":
                cancelled += 1
                assert generation.tokens == expected[: len(generation.tokens)]
            else:
                assert generation.tokens == expected, request
                assert generation.stats.new_tokens == len(expected)
            if request.likeliest is not None:
                assert [report.token for report in generation.logprobs] == generation.tokens
    assert cancelled and engine.totals.preempted and engine.totals.shared and engine.totals.together > 3
    if modules:
        kept = sum(sum(generation.stats.accepted) for _, made in asked for generation in made)
        assert kept > 25


# Each of these is known to have broken the others somewhere.
FEATURES = {
    "drafts": {"drafts": 3},
    "samples": {"samples": 3},
    "allowed": {"allowed": other_parity},
    "penalty": {"sampling": Sampling(repetition_penalty=1.5)},
    "seed": {"sampling": Sampling(temperature=0.7, top_p=0.9, seed=3)},
    "stop": {"stop_ids": {1, 5, 9, 13}},
    "likeliest": {"likeliest": 3},
}
PLACES = {
    "chunks": {"budget": 3, "most": 3},
    "preemption": {"pages": 7},
    "prefix": {},
    "invariant": {"invariant": True},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pair", list(combinations(FEATURES, 2)), ids="-".join)
def test_every_pair_of_features_in_every_place(pair: tuple[str, str], place: str) -> None:
    model = model_of(2)
    engine = engine_of(model, **PLACES[place])
    first = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    prompts = [first, [*first, 7, 9], [2, 7, 1, 8]]
    if place == "prefix":
        engine.submit(Request(first, max_new_tokens=1))
        engine.run()
    requests = [Request(prompt, max_new_tokens=12, **(FEATURES[pair[0]] | FEATURES[pair[1]])) for prompt in prompts]
    made = [engine.submit(request) for request in requests]
    engine.run()
    for request, generations in zip(requests, made, strict=True):
        expected = [alone(model, request, sample) for sample in range(request.samples)]
        assert [generation.tokens for generation in generations] == expected
    assert engine.totals.preempted or place != "preemption"
    assert engine.totals.shared or place != "prefix"
    assert engine.load.pages_held == 0


@pytest.mark.parametrize("budget", [8, 9, 24])
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_rows_of_trunk_and_modules_are_true_whatever_happened(modules: int, budget: int) -> None:
    """After sharing, parting and preemption they are what one pass over the tokens makes."""
    model, source = model_of(modules), random.Random(5)
    engine = engine_of(model, pages=26, budget=budget, most=8)
    checked = 0
    (prefix,) = some_prefixes(source, 1)
    for _ in range(25):
        prompt = [*prefix[: source.randrange(1, 24)], source.randrange(V)]
        samples, drafts = source.choice((1, 3)), source.choice(("auto", 1, 4))
        engine.submit(Request(prompt, source.randrange(1, 24), samples=samples, drafts=drafts))
        for _ in range(3):
            engine.step()
            for generation in engine._jobs.values():
                checked += generation.chain.seen > 0 and assert_rows_are_true(engine, generation)
    assert checked > 50 and engine.totals.preempted and engine.totals.shared


@torch.inference_mode()
def assert_rows_are_true(engine: Engine, generation: Generation) -> bool:
    model, job, chain = engine.model, generation.job, generation.chain
    assert job is not None and chain.seen + sum(map(len, chain.unseen)) == job.done
    end, trunk = chain.seen, model.config.num_hidden_layers
    tokens, plain, dispatch = torch.tensor(job.tokens), LatentCache(model.config, end, torch.float64), GroupedDispatch()
    span = Span(job.table.pages, 0, end)
    rows_MSL = engine.cache.rows_MZL[:, engine.cache.slots(span)]
    hidden_TD, _ = model(tokens[:end], torch.arange(end), plain.at(0), dispatch)
    torch.testing.assert_close(rows_MSL[:trunk], plain.rows_MSL[:trunk, :end], atol=1e-5, rtol=0)
    for k in range(1, model.config.num_nextn_predict_layers + 1):
        true = end - k + 1
        if true <= 0:
            break
        hidden_TD, _ = model.draft(
            k - 1, hidden_TD[:true], tokens[k : true + k], torch.arange(true), plain.at(0), dispatch
        )
        layer = trunk + k - 1
        torch.testing.assert_close(rows_MSL[layer, :true], plain.rows_MSL[layer, :true], atol=1e-5, rtol=0)
    return True


INVARIANT = {
    "greedy": ({}, {"drafts": 0}),
    "drafts": ({}, {"drafts": 2}),
    "seeded, drafts as many as pay": ({}, {"sampling": Sampling(temperature=1.0, seed=3)}),
    "one key head": (
        {
            "attention": "gqa",
            "num_key_value_heads": 1,
            "qk_rope_head_dim": 12,
            "q_lora_rank": None,
            "kv_lora_rank": 0,
            "qk_nope_head_dim": 0,
        },
        {"drafts": 0},
    ),
}


@pytest.mark.parametrize("case", INVARIANT)
def test_invariance_holds_to_the_bit(case: str) -> None:
    """Log probabilities, in float32, alone and in a crowd, in pieces and whole."""
    changes, asked = INVARIANT[case]
    model = random_model(small_config(max_position_embeddings=LIMIT).replace(**changes), seed=4)
    request = Request([5, 3, 9, 2, 8, 1, 7], max_new_tokens=16, likeliest=4, **asked)
    reports = []
    for company, options in ((0, {}), (5, {}), (5, {"budget": 6, "most": 6}), (5, {"pages": 14})):
        engine = engine_of(model, invariant=True, **options)
        source = random.Random(company)
        others = [Request([source.randrange(40) for _ in range(1 + 3 * n)], 12, drafts="auto") for n in range(company)]
        for other in others:
            engine.submit(other)
        (mine,) = engine.submit(request)
        engine.run()
        reports.append(mine.logprobs)
    assert all(report == reports[0] for report in reports)


def test_without_invariance_company_does_move_the_last_bits() -> None:
    """Else the test above would prove nothing."""
    model = random_model(small_config(max_position_embeddings=LIMIT), seed=4)
    request, reports = Request([5, 3, 9, 2, 8, 1, 7], max_new_tokens=16, likeliest=4, drafts=0), []
    for company in (0, 5):
        engine = engine_of(model)
        for n in range(company):
            engine.submit(Request([n] * (1 + 3 * n), 12))
        (mine,) = engine.submit(request)
        engine.run()
        reports.append(mine.logprobs)
    assert [report.token for report in reports[0]] == [report.token for report in reports[1]]
    assert reports[0] != reports[1]


def test_sampled_output_keeps_its_distribution_in_company() -> None:
    """Of the third token after two that were the likeliest; by then drafts are verified."""
    model = model_of(1)
    sampling, prompt = Sampling(temperature=1.5, top_k=6), [3, 1, 4]

    def the_likeliest_first(tokens: Sequence[int]) -> Tensor | None:
        return torch.arange(V) == way[len(tokens) - 3] if len(tokens) < 5 else None

    way = alone(model, Request(prompt, 2))
    engine = engine_of(model, pages=400, most=32, budget=128)
    request = Request(prompt, 6, sampling, drafts=2, samples=8, allowed=the_likeliest_first)
    made = [engine.submit(request) for _ in range(60)]
    engine.run()
    counts = Counter(generation.tokens[2] for generations in made for generation in generations)
    line = [*prompt, *way]
    logits_V = model.logits(torch.tensor(line))[-1].detach()
    probs = distribution(logits_V, line, sampling)
    found = [counts[token] for token in range(V)]
    assert chi_square(found, probs.tolist()) > COMMON
    assert chi_square(found, distribution(logits_V, line, Sampling(temperature=0.5, top_k=6)).tolist()) < SURELY_NOT
    assert sum(sum(generation.stats.accepted) for generations in made for generation in generations) > 100


def test_samples_of_a_seed_are_the_same_again_and_differ_from_one_another() -> None:
    request = Request([3, 1, 4], 12, Sampling(temperature=1.0, seed=7), samples=3)
    outputs = []
    for most in (3, 12):
        engine = engine_of(model_of(1), most=most)
        made = engine.submit(request)
        engine.run()
        outputs.append([generation.tokens for generation in made])
    assert outputs[0] == outputs[1]
    assert len(set(map(tuple, outputs[0]))) == 3


def test_iterating_over_one_brings_all_further() -> None:
    engine = engine_of(model_of(1))
    (one,), (two,) = engine.submit(Request([1, 2], 8)), engine.submit(Request([3], 30))
    assert list(one) == alone(engine.model, one.request)
    assert two.tokens and not two.stats.finish
    assert list(two) == alone(engine.model, two.request)


def test_a_stop_string_ends_its_own_generation() -> None:
    engine = engine_of(model_of(1))
    (mine,), (other,) = engine.submit(Request([1, 2], 30)), engine.submit(Request([3], 12))
    expected = alone(engine.model, mine.request)
    word = "".join(f"<{token}>" for token in expected[4:6])

    class Decoder:
        def push(self, token_id: int) -> str:
            return f"<{token_id}>"

        def flush(self) -> str:
            return ""

    text = "".join(TextStream(mine, Decoder(), [word]))
    whole = "".join(f"<{token}>" for token in expected)
    assert text == whole[: whole.index(word)] and mine.stats.finish == f"stop string {word!r}"
    engine.run()
    assert other.tokens == alone(engine.model, other.request) and engine.load.pages_held == 0


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


def test_a_hook_that_calls_the_engine_is_told_so() -> None:
    engine = engine_of(model_of(1))

    def calls(tokens: Sequence[int]) -> None:
        engine.step()

    (bad,), (good,) = engine.submit(Request([1], 4, allowed=calls)), engine.submit(Request([2], 4))
    with pytest.raises(UserError, match="A hook called the engine"):
        list(bad)
    assert list(good) == alone(engine.model, good.request)


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


def test_what_has_ended_holds_no_states() -> None:
    engine = engine_of(model_of(2), most=4)
    made = [engine.submit(Request([n, 2], 9, samples=2))[n % 2] for n in range(4)]
    engine.step()
    made[0].cancel()
    engine.run()
    for generation in made:
        assert generation.chain.unseen == generation.chain.edge == generation.chain.tail == generation.guesses == []


def test_statistics_say_what_waiting_was_and_what_drafts_were_worth() -> None:
    ticks = iter(range(10**6))
    engine = engine_of(model_of(1), most=1, clock=lambda: float(next(ticks)))
    (first,), (second,) = engine.submit(Request([1], 30, drafts=1)), engine.submit(Request([2], 6, drafts=0))
    engine.run()
    assert first.stats.queue_seconds < 10 < second.stats.queue_seconds
    assert second.stats.prefill_seconds < 10 and second.stats.gain is None and len(second.stats.plain_seconds) == 5
    assert sum(first.stats.round_tokens) + len(first.stats.plain_seconds) == first.stats.new_tokens - 1
    (without,) = engine_of(model_of(0)).submit(Request([1], 2))
    assert without.stats.off == "the model has no MTP module"


def test_in_company_no_gain_is_claimed() -> None:
    engine = engine_of(model_of(1))
    both = [*engine.submit(Request([1], 20, drafts=1)), *engine.submit(Request([2], 20, drafts=1))]
    while not any(generation.stats.finish for generation in both):
        engine.step()
    assert all(generation.stats.round_tokens and generation.stats.gain is None for generation in both)


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


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request([]), "prompt is empty"),
        (Request([10**6]), "unknown token ids"),
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
        {"samples": 0},
        {"priority": None},
        {"client": 3},
        {"likeliest": -1},
        {"drafts": "many"},
        {"stop_ids": {"end"}},
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
        ({"most": 0}, "most = 0"),
        ({"page": 0}, "page = 0"),
        ({"queue": 0}, "queue = 0"),
        ({"budget": 3, "most": 4}, "budget is too small"),
    ],
)
def test_an_engine_that_cannot_work_is_not_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Engine(model_of(0), **options)


def test_the_context_ends_a_generation_as_it_does_alone() -> None:
    model = model_of(1)
    engine = engine_of(model)
    (mine,) = engine.submit(Request([1] * 60, 30, drafts=3))
    engine.run()
    assert mine.tokens == generate_tokens(model, [1] * 60, 30, mtp=False)
    assert mine.stats.finish == f"context's limit of {LIMIT} tokens"
