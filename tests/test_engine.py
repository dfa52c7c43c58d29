"""The engine: whatever company a request has, its output is what `generate` makes of it alone."""

import random
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.model.ports import GroupedDispatch
from cavelight.model.transformer import Transformer
from cavelight.run.cache import LatentCache
from cavelight.run.engine import Engine, page_bytes
from cavelight.run.generate import TokenStream, generate_tokens
from cavelight.run.paged import Span
from cavelight.run.request import Generation, Request
from cavelight.run.sample import Sampling, distribution
from cavelight.run.text import TextStream

from .chance import SURELY_NOT, chi_square
from .run_models import drafting_model, random_model, small_config

LIMIT = 64


def model_of(modules: int, dtype: torch.dtype = torch.float64) -> Transformer:
    """Drafts of it are often right. In float64 rounding decides nothing, so that outputs can be compared."""
    config = small_config(num_nextn_predict_layers=modules, max_position_embeddings=LIMIT)
    return drafting_model(config, seed=2, surprise=0.25).to(dtype)


def engine_of(model: Transformer, pages: int = 40, page: int = 4, **options: object) -> Engine:
    memory = pages * page_bytes(model.config, page, model.lm_head.weight.dtype)
    return Engine(model, memory=memory, page=page, **options)  # type: ignore[arg-type]


def even(tokens: Sequence[int]) -> Tensor:
    """Which tokens may follow: those of the other parity than the last."""
    return torch.arange(tiny_vocabulary()) % 2 != tokens[-1] % 2


def tiny_vocabulary() -> int:
    return small_config().vocab_size


def alone(model: Transformer, request: Request) -> list[int]:
    """The plain twin."""
    stream = TokenStream(
        model,
        request.prompt,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop_ids=request.stop_ids,
        drafts=0,
        allowed=request.allowed,
    )
    return list(stream)


def some_request(source: random.Random, prefixes: list[list[int]], modules: int) -> Request:
    V = tiny_vocabulary()
    prompt = source.choice(prefixes)[: source.randrange(1, 24)] + [
        source.randrange(V) for _ in range(source.randrange(9))
    ]
    return Request(
        prompt,
        max_new_tokens=source.randrange(1, 24),
        sampling=Sampling(repetition_penalty=source.choice((1.0, 1.0, 1.3))),
        stop_ids=source.choice((None, {1, 5})),
        samples=source.choice((1, 1, 1, 3)),
        drafts=source.choice(("auto", 0, 1, 3)) if modules else 0,
        priority=source.randrange(3),
        client=source.choice("abc"),
        likeliest=source.choice((None, 2)),
        allowed=source.choice((None, None, even)),
    )


@pytest.mark.parametrize("modules", [0, 1, 2, 3])
def test_a_crowd_gets_what_each_would_get_alone(modules: int) -> None:
    model, source = model_of(modules), random.Random(modules)
    engine = engine_of(model, pages=24, budget=24, most=6)
    seen = watch(engine)
    prefixes = [[source.randrange(tiny_vocabulary()) for _ in range(24)] for _ in range(4)]
    asked: list[tuple[Request, list[Generation]]] = []
    for _ in range(60):
        request = some_request(source, prefixes, modules)
        asked.append((request, engine.submit(request)))
        for _ in range(source.randrange(4)):
            engine.step()
        if source.random() < 0.15:
            source.choice(source.choice(asked)[1]).cancel()
    engine.run()
    assert engine.load.running == engine.load.waiting == engine.load.pages_held == 0
    cancelled = 0
    for request, made in asked:
        expected = alone(model, request)
        for generation in made:
            if generation.stats.finish == "cancelled":
                cancelled += 1
                assert generation.tokens == expected[: len(generation.tokens)]
            else:
                assert generation.tokens == expected, request
                assert generation.stats.new_tokens == len(expected)
            if request.likeliest is not None:
                assert [report.token for report in generation.logprobs] == generation.tokens
    assert cancelled and seen["preempted"] and seen["shared"] and seen["together"] > 3
    if modules:
        kept = sum(sum(generation.stats.accepted) for _, made in asked for generation in made)
        assert kept > 50


def watch(engine: Engine) -> dict[str, int]:
    """Counts what its scheduler does."""
    seen, plan = {"preempted": 0, "shared": 0, "together": 0}, engine.scheduler.plan

    def watched() -> object:
        step = plan()
        seen["preempted"] += len(step.preempted)
        seen["shared"] += sum(job.shared for job in step.begun)
        seen["together"] = max(seen["together"], len(step.parts))
        return step

    engine.scheduler.plan = watched  # type: ignore[assignment, method-assign]
    return seen


# Each of these is known to have broken the others somewhere.
FEATURES = {
    "drafts": {"drafts": 3},
    "samples": {"samples": 3},
    "allowed": {"allowed": even},
    "penalty": {"sampling": Sampling(repetition_penalty=1.5)},
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
    seen = watch(engine)
    first = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    prompts = [first, [*first, 7, 9], [2, 7, 1, 8]]
    if place == "prefix":
        engine.submit(Request(first, max_new_tokens=1))
        engine.run()
    requests = [Request(prompt, max_new_tokens=12, **(FEATURES[pair[0]] | FEATURES[pair[1]])) for prompt in prompts]
    made = [engine.submit(request) for request in requests]
    engine.run()
    for request, generations in zip(requests, made, strict=True):
        expected = alone(model, request)
        assert [generation.tokens for generation in generations] == [expected] * request.samples
    assert seen["preempted"] or place != "preemption"
    assert seen["shared"] or place != "prefix"
    assert engine.load.pages_held == 0


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_rows_of_trunk_and_modules_are_true_whatever_happened(modules: int) -> None:
    """After sharing, parting and preemption they are what one pass over the tokens makes."""
    model, source = model_of(modules), random.Random(5)
    engine = engine_of(model, pages=26, budget=24, most=8)
    seen, checked = watch(engine), 0
    prefix = [source.randrange(tiny_vocabulary()) for _ in range(24)]
    for _ in range(25):
        prompt = [*prefix[: source.randrange(1, 24)], source.randrange(tiny_vocabulary())]
        samples, drafts = source.choice((1, 3)), source.choice(("auto", 1, 4))
        engine.submit(Request(prompt, source.randrange(1, 24), samples=samples, drafts=drafts))
        for _ in range(3):
            engine.step()
            for generation in engine._jobs.values():
                checked += generation.chain.seen > 0 and assert_rows_are_true(engine, generation)
    assert checked > 50 and seen["preempted"] and seen["shared"]


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


def test_invariance_holds_to_the_bit() -> None:
    """Log probabilities, in float32, alone and in a crowd, in pieces and whole."""
    model = random_model(small_config(max_position_embeddings=LIMIT), seed=4)
    request = Request([5, 3, 9, 2, 8, 1, 7], max_new_tokens=16, likeliest=4, drafts=0)
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
    model = model_of(1)
    sampling, prompt = Sampling(temperature=1.5, top_k=6), [3, 1, 4]
    engine = engine_of(model, pages=200, most=32, budget=128)
    made = [engine.submit(Request(prompt, 2, sampling, drafts=1, samples=8)) for _ in range(60)]
    engine.run()
    found = [0] * tiny_vocabulary()
    for generations in made:
        for generation in generations:
            found[generation.tokens[0]] += 1
    probs = distribution(model.logits(torch.tensor(prompt))[-1].detach(), prompt, sampling)
    assert chi_square(found, probs.tolist()) > SURELY_NOT


def test_samples_of_a_seed_are_the_same_again_and_differ_from_one_another() -> None:
    request = Request([3, 1, 4], 12, Sampling(temperature=1.0, seed=7), samples=3, drafts=0)
    outputs = []
    for _ in range(2):
        engine = engine_of(model_of(0), invariant=True)
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


def test_an_error_ends_one_generation_alone() -> None:
    def never(tokens: Sequence[int]) -> Tensor | None:
        return torch.zeros(tiny_vocabulary(), dtype=torch.bool) if len(tokens) > 6 else None

    engine = engine_of(model_of(1))
    good, bad = engine.submit(Request([1, 2], 8)), engine.submit(Request([1, 2, 3], 8, allowed=never, samples=2))
    engine.run()
    assert good[0].tokens == alone(engine.model, good[0].request)
    for generation in bad:
        assert len(generation.tokens) == 4 and generation.stats.finish == "error"
        with pytest.raises(UserError, match="No token is allowed"):
            list(generation)
    assert engine.load.pages_held == 0


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_hook_that_fails_ends_its_own_generation(drafts: int) -> None:
    def broken(tokens: Sequence[int]) -> Tensor | None:
        if len(tokens) > 6:
            raise ZeroDivisionError
        return None

    engine = engine_of(model_of(1))
    (good,) = engine.submit(Request([1, 2], 8))
    (bad,) = engine.submit(Request([1, 2, 3], 8, allowed=broken, drafts=drafts))
    engine.run()
    assert good.tokens == alone(engine.model, good.request) and engine.load.pages_held == 0
    with pytest.raises(ZeroDivisionError):
        list(bad)


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
        (Request([1], 5, samples=0), "samples"),
        (Request([1], 5, samples=99), "samples"),
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


def test_too_little_memory_is_an_error() -> None:
    with pytest.raises(UserError, match="too small"):
        Engine(model_of(0), memory=100)


def test_the_context_ends_a_generation_as_it_does_alone() -> None:
    model = model_of(1)
    engine = engine_of(model)
    (mine,) = engine.submit(Request([1] * 60, 30, drafts=3))
    engine.run()
    assert mine.tokens == generate_tokens(model, [1] * 60, 30, mtp=False)
    assert mine.stats.finish == f"context's limit of {LIMIT} tokens"
