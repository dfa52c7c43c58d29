"""What the drafts of a trained model are worth: acceptance and speed on held-out text, and whether a token changes.

python -m bench.speculation runs/demo writes docs/results/speculation.md. Each prompt is the beginning of a window of
held-out text; it is continued greedily without drafts and with each number of them, in turn, so that whatever else the
machine does meets all alike. The same is done with chance, and from prompts of random tokens, which nothing can guess;
and all prompts go through the engine together.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.provenance import commit, leave_with, machine, some
from cavelight.api import load
from cavelight.cli.progress import screen
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.run.engine import Engine
from cavelight.run.generate import GREEDY, Drafts, TokenStream
from cavelight.run.quick import without_native
from cavelight.run.request import Request
from cavelight.run.sample import Sampling
from cavelight.run.speculate import cost_of_round
from cavelight.run.stats import added
from cavelight.spec.events import Event, Phase
from cavelight.train.prepare import held_out, read_corpora
from cavelight.train.state import RunFolder


@dataclass
class Tally:
    """All prompts with one number of drafts."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    same: int = 0
    settled: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, stream: TokenStream, same: bool) -> None:
        stats = stream.stats
        self.seconds.append(stats.decode_seconds)
        self.tokens += stats.new_tokens - 1
        self.same += same
        self.settled += stats.settled
        self.proposed = added(self.proposed, stats.proposed)
        self.accepted = added(self.accepted, stats.accepted)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Acceptance, speed and losslessness of a run's drafts.")
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"), help="a run's folder (runs/demo)")
    parser.add_argument("--prompts", type=some, default=200, help="how many prompts (200)")
    parser.add_argument("--new", type=some, default=100, help="new tokens for each (100)")
    parser.add_argument(
        "--context", type=some, default=1 << 20, help="tokens of a prompt (all that rows have room for)"
    )
    parser.add_argument("--drafts", type=some, default=3, help="the most tokens to draft ahead (3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    parser.add_argument("--threads", type=some, default=1, help="torch's threads (1)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.run, getattr(torch, options.dtype))
    without_native()
    recipe = RunFolder(options.run).read_recipe()
    held, _ = held_out(read_corpora(recipe.data), tokenizer, lambda event: None)
    context = min(options.context, recipe.data.row_length - options.new)
    if context < 1:
        raise UserError("No room for a prompt", got=f"{options.new} new tokens in rows of {recipe.data.row_length}")
    starts = torch.linspace(0, len(held) - context - 1, options.prompts).long().tolist()
    prompts = [held.tokens_N[start : start + context].astype(int).tolist() for start in starts]
    settings: list[Drafts] = [*range(options.drafts + 1), "auto"]
    noise = torch.Generator().manual_seed(0)
    random = torch.randint(model.config.vocab_size, (max(1, len(prompts) // 10), context), generator=noise).tolist()
    with screen("continuing texts with drafts and without", as_json=False) as listen:
        tables = [
            measure(model, prompts, options.new, settings, GREEDY, listen),
            measure(model, prompts, options.new, [0, "auto"], Sampling(temperature=0.8, seed=1), listen),
            measure(model, random, options.new, [0, "auto"], GREEDY, listen),
        ]
        together = in_the_engine(model, prompts, options.new)
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "speculation.md"
    with file_beside(page) as scratch:
        scratch.write_text(report(model, tables, together, context, options.new, called), encoding="utf-8")
    print(f"wrote {page}")
    alike = all(tally.same == len(tally.seconds) for table in tables for tally in table.values())
    return 0 if alike and together == len(prompts) else 1


def measure(
    model: Transformer,
    prompts: Sequence[list[int]],
    new: int,
    settings: Sequence[Drafts],
    sampling: Sampling,
    listen: Callable[[Event], None],
) -> dict[Drafts, Tally]:
    tallies = {drafts: Tally() for drafts in settings}
    for number, prompt in enumerate(prompts):
        listen(Phase("generating", number, len(prompts), "prompts"))
        plain: list[int] = []
        for drafts, tally in tallies.items():
            stream = TokenStream(model, prompt, max_new_tokens=new, drafts=drafts, stop_ids=(), sampling=sampling)
            tokens = list(stream)
            plain = plain or tokens
            tally.add(stream, tokens == plain)
    return tallies


def in_the_engine(model: Transformer, prompts: Sequence[list[int]], new: int) -> int:
    """How many prompts get the same tokens in company and with drafts as alone and without."""
    engine = Engine(model, memory=1 << 28, most=16)
    made = [engine.submit(Request(prompt, new, stop_ids=frozenset(), drafts=2))[0] for prompt in prompts]
    engine.run()
    plain = (TokenStream(model, prompt, max_new_tokens=new, drafts=0, stop_ids=()) for prompt in prompts)
    return sum(generation.tokens == list(stream) for generation, stream in zip(made, plain, strict=True))


def report(
    model: Transformer,
    tables: Sequence[dict[Drafts, Tally]],
    together: int,
    context: int,
    new: int,
    called: Sequence[str],
) -> str:
    rows = []
    for what, table in zip(("held-out, greedy", "held-out, temperature 0.8", "random tokens"), tables, strict=True):
        for drafts, tally in table.items():
            places = ", ".join(f"{a / p:.1%}" for a, p in zip(tally.accepted, tally.proposed, strict=True)) or "-"
            ratios = [plain / own for plain, own in zip(table[0].seconds, tally.seconds, strict=True)]
            rows.append(
                f"| {what} | {drafts} | {places} | {tally.tokens / sum(tally.seconds):,.0f} "
                f"| {statistics.median(ratios):.2f} | {tally.same:,} of {len(ratios):,} | {tally.settled} |"
            )
    prompts = len(tables[0][0].seconds)
    costs = ", ".join(f"{cost_of_round(model.config, drafts):.2f}" for drafts in (1, 2, 3))
    return f"""# What the drafts are worth

{prompts:,} windows of held-out text, each a prompt of {context} tokens that is continued by {new}, without drafts and
with each number of them in turn; and prompts of random tokens. Prediction modules: {len(model.mtp)}; drafts beyond that
apply the last one to its own output. Drafts are turned off by themselves with "auto" only.

| text | drafts | accepted, 1st, 2nd, ... | tokens/s | times plain (median) | same tokens | near-ties settled |
|---|--:|--:|--:|--:|--:|--:|
{chr(10).join(rows)}

In the engine, all of them at once and with two drafts each: {together:,} of {prompts:,} get the same tokens as alone.
Layers: {without_native() or "natively"}.

A round with 1, 2, 3 drafts has to read {costs} times what a plain step reads: the module is a layer of its own beside
{model.config.num_hidden_layers} others, and the head is read once more. Tokens a round over that is the most that
drafts can give where reading is what takes the time.

Command: `{shlex.join(["python", "-m", "bench.speculation", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(model.lm_head.weight.dtype)}
"""


if __name__ == "__main__":
    leave_with(main)
