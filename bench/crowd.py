"""Ten thousand requests in a crowd: does each get what it would get alone, and does nothing leak?

python -m bench.crowd writes docs/results/crowd.md. Requests come at random times with random prompts (many begin
alike), lengths, samples, priorities, clients, masks and numbers of drafts; some are cancelled; pages are so few that
many have to give way. Every output, greedy or drawn by a seed, is compared with that of the plain `generate`, token for
token. The model is a random one in float64 whose drafts are often right: there rounding decides nothing.

With --minutes it goes on for so long, in float32 and by kernels.native, whose bits do not depend on company either, and
writes docs/results/soak.md.
"""

import argparse
import gc
import random
import resource
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from tests.crowds import alone, some_prefixes, some_request
from tests.run_models import drafting_model, small_config

from bench.provenance import commit, leave_with, machine, some
from cavelight.cli.progress import screen
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.run.engine import Engine, page_bytes
from cavelight.run.quick import without_native
from cavelight.run.request import Generation, Request
from cavelight.run.stats import added
from cavelight.spec.events import Event, Phase

PAGE, PAGES, BUDGET, MOST = 4, 40, 32, 8


@dataclass
class Tally:
    """What happened."""

    requests: int = 0
    outputs: int = 0
    wrong: int = 0
    cancelled: int = 0
    tokens: int = 0
    seconds: float = 0.0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes resident, after every thousand requests


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A crowd of random requests against the plain twin.")
    parser.add_argument("--requests", type=some, default=10_000, help="how many (10000)")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for so long instead")
    parser.add_argument("--modules", type=some, default=2, help="MTP modules of the model (2)")
    parser.add_argument("--threads", type=some, default=1, help="torch's threads (1)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = small_config(num_nextn_predict_layers=options.modules, max_position_embeddings=64)
    dtype = torch.float32 if options.minutes else torch.float64
    if options.minutes and (why := without_native()):
        raise UserError("The long run is about the native layers", why=why)
    model = drafting_model(config, seed=2, surprise=0.25).to(dtype)
    engine = Engine(model, memory=PAGES * page_bytes(config, PAGE, dtype), page=PAGE, budget=BUDGET, most=MOST)
    with screen("A crowd of requests", as_json=False) as listen:
        tally = crowd(model, engine, options.requests, options.minutes * 60, listen)
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / ("soak.md" if options.minutes else "crowd.md")
    with file_beside(page) as scratch:
        scratch.write_text(report(engine, tally, called), encoding="utf-8")
    print(f"wrote {page}")
    return 1 if tally.wrong or engine.load.pages_held else 0


def crowd(model: Transformer, engine: Engine, requests: int, seconds: float, listen: Callable[[Event], None]) -> Tally:
    """So many requests; or, if `seconds` are given, as many as there is time for."""
    source, tally, began = random.Random(1), Tally(), time.monotonic()
    prefixes = some_prefixes(source, 6)
    asked: list[tuple[Request, list[Generation]]] = []
    for number in count():
        if number % 100 == 0 and (time.monotonic() - began >= seconds if seconds else number >= requests):
            break
        request = some_request(source, prefixes, drafting=True)
        asked.append((request, engine.submit(request)))
        for _ in range(source.randrange(8)):
            engine.step()
        if source.random() < 0.1:
            source.choice(source.choice(asked[-20:])[1]).cancel()
        if number % 100 == 99 or (not seconds and number == requests - 1):
            done = (round(time.monotonic() - began), round(seconds)) if seconds else (number + 1, requests)
            listen(Phase("asking", *done, "s" if seconds else "requests"))
            engine.run()
            assert engine.load.pages_held == 0, "pages leaked"
            for each in asked:
                compare(model, *each, tally)
            asked.clear()
        if number % 1000 == 999:
            gc.collect()
            tally.memory.append(resident())
    tally.seconds = time.monotonic() - began
    return tally


def compare(model: Transformer, request: Request, made: list[Generation], tally: Tally) -> None:
    tally.requests += 1
    for sample, generation in enumerate(made):
        expected, cut = alone(model, request, sample), generation.stats.finish == "cancelled"
        tally.outputs += 1
        tally.cancelled += cut
        tally.wrong += generation.tokens != (expected[: len(generation.tokens)] if cut else expected)
        tally.tokens += len(generation.tokens)
        tally.proposed = added(tally.proposed, generation.stats.proposed)
        tally.accepted = added(tally.accepted, generation.stats.accepted)


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def report(engine: Engine, tally: Tally, called: Sequence[str]) -> str:
    totals = engine.totals
    drafts = ", ".join(f"{kept:,} of {made:,}" for kept, made in zip(tally.accepted, tally.proposed, strict=True))
    every = max(1, len(tally.memory) // 12)
    memory = ", ".join(f"{size / 1e6:.1f}" for size in tally.memory[::every])
    dtype = str(engine.cache.rows_MZW.dtype).removeprefix("torch.")
    how = "plainly in float64" if dtype == "float64" else f"natively in {dtype}"
    return f"""# A crowd of requests

{tally.requests:,} random requests on an engine with {PAGES} pages of {PAGE} positions, {BUDGET} tokens a step and
{MOST} generations at once: greedy and seeded, prompts that begin alike, several samples, stop tokens, repetition
penalties, masks of allowed tokens (one of them a grammar that ends), priorities, clients, drafts from none to four and
as many as pay, and cancellations. Every output is compared with that of the plain `generate`; both compute {how}.

| | |
|---|--:|
| requests, outputs, new tokens | {tally.requests:,}, {tally.outputs:,}, {tally.tokens:,} |
| outputs that differ from the plain twin's | {tally.wrong} |
| cancelled in mid-work | {tally.cancelled:,} |
| preempted, and begun again | {totals.preempted:,} |
| positions found in the cache instead of computed | {totals.shared:,} |
| drafts kept, by depth | {drafts} |
| steps; the most generations in one | {totals.steps:,}; {totals.together} |
| pages held at the end | {engine.load.pages_held} |
| minutes | {tally.seconds / 60:.1f} |
| resident memory after every {every * 1000:,} requests, MB | {memory} |

Command: `{shlex.join(["python", "-m", "bench.crowd", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


if __name__ == "__main__":
    leave_with(main)
