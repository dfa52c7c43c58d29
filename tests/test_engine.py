"""The engine: whatever company a request has, its output is what `generate` makes of it alone."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from cavelight.model.ports import GroupedDispatch
from cavelight.run.cache import LatentCache
from cavelight.run.engine import Engine
from cavelight.run.generate import TokenStream, generate_tokens
from cavelight.run.paged import Span
from cavelight.run.request import Generation, Request
from cavelight.run.sample import Sampling, distribution
from cavelight.run.text import TextStream

from .chance import COMMON, SURELY_NOT, chi_square
from .crowds import V, alone, other_parity, some_prefixes, some_request
from .engines import LIMIT, engine_of, model_of
from .run_models import random_model, small_config


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
        assert kept > 15, "or drafts are hardly looked at"


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
    rows_MSW = engine.cache.rows_MZW[:, engine.cache.slots(span)]
    hidden_TD, _ = model(tokens[:end], torch.arange(end), plain.at(0), dispatch)
    torch.testing.assert_close(rows_MSW[:trunk], plain.rows_MSW[:trunk, :end], atol=1e-5, rtol=0)
    for k in range(1, model.config.num_nextn_predict_layers + 1):
        true = end - k + 1
        if true <= 0:
            break
        hidden_TD, _ = model.draft(
            k - 1, hidden_TD[:true], tokens[k : true + k], torch.arange(true), plain.at(0), dispatch
        )
        layer = trunk + k - 1
        torch.testing.assert_close(rows_MSW[layer, :true], plain.rows_MSW[layer, :true], atol=1e-5, rtol=0)
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


@pytest.mark.parametrize("drafts", [0, 3])
def test_log_probabilities_are_the_models_own(drafts: int) -> None:
    """Whatever filters, masks and drafts there are."""
    model, engine = model_of(2), engine_of(model_of(2))
    sampling = Sampling(temperature=0.6, top_k=3, repetition_penalty=1.5, seed=2)
    asked = {"sampling": sampling, "drafts": drafts, "allowed": other_parity}
    made = [engine.submit(Request([3, 1, 4], 12, likeliest=likeliest, **asked))[0] for likeliest in (4, 0)]
    engine.run()
    assert drafts == 0 or sum(made[0].stats.accepted)
    log_p_TV = model.logits(torch.tensor([3, 1, 4, *made[0].tokens])).detach().log_softmax(dim=-1)[2:-1]
    for report, token, log_p_V in zip(made[0].logprobs, made[0].tokens, log_p_TV, strict=True):
        top = log_p_V.topk(4)
        assert (report.token, report.logprob) == (token, pytest.approx(float(log_p_V[token]), abs=1e-6))
        assert [id for id, _ in report.likeliest] == top.indices.tolist()
        assert [logprob for _, logprob in report.likeliest] == pytest.approx(top.values.tolist(), abs=1e-6)
    assert [report.likeliest for report in made[1].logprobs] == [[]] * 12


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


@pytest.mark.parametrize("seed", range(3))
def test_samples_without_drafts_give_way_and_come_back(seed: int) -> None:
    """They part in the middle of what a page with the modules' rows would be known by."""
    source, model = random.Random(seed), model_of(2)
    engine = engine_of(model, pages=14, budget=32, most=8)
    asked = []
    for _ in range(30):
        sampling = Sampling(temperature=1.0, seed=source.randrange(5))
        prompt, priority = [source.randrange(4)] * source.randrange(2, 9), source.randrange(3)
        request = Request(prompt, 12, sampling, samples=3, drafts=0, priority=priority)
        asked.append((request, engine.submit(request)))
        for _ in range(source.randrange(6)):
            engine.step()
    engine.run()
    assert engine.totals.preempted and engine.totals.shared
    for request, made in asked:
        assert [generation.tokens for generation in made] == [alone(model, request, sample) for sample in range(3)]


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


@pytest.mark.parametrize("last", [4, 5, 7])
def test_a_stop_string_ends_it_whatever_its_step_had_come_to(last: int) -> None:
    """With drafts the limit may be behind it in the same step; then it is not what ended the text."""
    model = model_of(1)
    (mine,) = engine_of(model).submit(Request([1, 2], last, drafts=2))
    expected = alone(model, mine.request)

    class Decoder:
        def push(self, token_id: int) -> str:
            return f"<{token_id}>"

        def flush(self) -> str:
            return ""

    for tokens in (mine, TokenStream(model, [1, 2], max_new_tokens=last, drafts=2)):
        text = "".join(TextStream(tokens, Decoder(), [f"<{expected[3]}>"]))
        assert text == "".join(f"<{token}>" for token in expected[: expected.index(expected[3])])
        assert tokens.stats.finish == f"stop string '<{expected[3]}>'"


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


def test_the_context_ends_a_generation_as_it_does_alone() -> None:
    model = model_of(1)
    engine = engine_of(model)
    (mine,) = engine.submit(Request([1] * 60, 30, drafts=3))
    engine.run()
    assert mine.tokens == generate_tokens(model, [1] * 60, 30, mtp=False)
    assert mine.stats.finish == f"context's limit of {LIMIT} tokens"
