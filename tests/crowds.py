"""Random requests for an engine, and what each would get alone."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cavelight.model.transformer import Transformer
from cavelight.run.generate import TokenStream
from cavelight.run.request import Request
from cavelight.run.sample import Sampling

from .run_models import small_config

V = small_config().vocab_size


def other_parity(tokens: Sequence[int]) -> Tensor:
    """Tokens of the other parity than the last may follow."""
    return torch.arange(V) % 2 != tokens[-1] % 2


def until_a_five(tokens: Sequence[int]) -> Tensor:
    """A grammar with an end: after a multiple of five comes the end token, 1, and after that nothing may."""
    if tokens[-1] % 5 == 0:
        return torch.arange(V) == 1
    return torch.full((V,), tokens[-1] != 1)


def some_prefixes(source: random.Random, count: int = 4) -> list[list[int]]:
    return [[source.randrange(V) for _ in range(24)] for _ in range(count)]


def some_request(source: random.Random, prefixes: list[list[int]], drafting: bool) -> Request:
    """A prompt of up to 32 tokens that begins like others, greedy or seeded, and any of what else can be asked."""
    prompt = source.choice(prefixes)[: source.randrange(1, 24)]
    prompt += [source.randrange(V) for _ in range(source.randrange(9))]
    allowed = source.choice((None, None, None, other_parity, until_a_five))
    stop_ids: set[int] | None = source.choice((None, {1, 5}))
    if allowed is until_a_five:
        prompt[-1], stop_ids = 2, {1}
    return Request(
        prompt,
        max_new_tokens=source.randrange(1, 32),
        sampling=Sampling(
            source.choice((0.0, 0.0, 0.8)),
            repetition_penalty=source.choice((1.0, 1.0, 1.3)),
            seed=source.randrange(99),
        ),
        stop_ids=stop_ids,
        samples=source.choice((1, 1, 1, 1, 3)),
        drafts=source.choice(("auto", "auto", 0, 1, 4)) if drafting else 0,
        priority=source.randrange(3),
        client=source.choice("abcd"),
        likeliest=source.choice((None, None, 2)),
        allowed=allowed,
    )


def alone(model: Transformer, request: Request, sample: int = 0) -> list[int]:
    """The plain twin's output, without drafts."""
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + sample)
    stream = TokenStream(
        model,
        request.prompt,
        max_new_tokens=request.max_new_tokens,
        sampling=sampling,
        stop_ids=request.stop_ids,
        drafts=0,
        allowed=request.allowed,
    )
    return list(stream)
