"""What the drafts of a trained model are worth: acceptance and speed on held-out text, and whether a token changes.

python -m bench.speculation runs/demo writes docs/results/speculation.md. Each prompt is the beginning of a window of
held-out text; it is continued greedily without drafts and with each number of them, in turn, so that whatever else the
machine does meets all alike.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.provenance import commit, leave_with, machine
from cavelight.api import load
from cavelight.cli.progress import screen
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.run.generate import TokenStream
from cavelight.spec.events import Phase
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
        for mine, new in ((self.proposed, stats.proposed), (self.accepted, stats.accepted)):
            mine.extend([0] * (len(new) - len(mine)))
            for place, count in enumerate(new):
                mine[place] += count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Acceptance, speed and losslessness of a run's drafts.")
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"), help="a run's folder (runs/demo)")
    parser.add_argument("--prompts", type=int, default=200, help="how many prompts (200)")
    parser.add_argument("--new", type=int, default=100, help="new tokens for each (100)")
    parser.add_argument("--drafts", type=int, default=3, help="the most tokens to draft ahead (3)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.run, torch.float32)
    recipe = RunFolder(options.run).read_recipe()
    held, _ = held_out(read_corpora(recipe.data), tokenizer, lambda event: None)
    context = recipe.data.row_length - options.new
    if context < 1:
        raise UserError("No room for a prompt", got=f"{options.new} new tokens in rows of {recipe.data.row_length}")
    starts = torch.linspace(0, len(held) - context - 1, options.prompts).long().tolist()
    prompts = [held.tokens_N[start : start + context].astype(int).tolist() for start in starts]
    tallies = measure(model, prompts, options.new, options.drafts)
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "speculation.md"
    with file_beside(page) as scratch:
        scratch.write_text(
            report(tallies, len(model.mtp), len(prompts), context, options.new, called), encoding="utf-8"
        )
    print(f"wrote {page}")
    return 0 if all(tally.same == len(prompts) for tally in tallies) else 1


def measure(model: Transformer, prompts: Sequence[list[int]], new: int, most: int) -> list[Tally]:
    tallies = [Tally() for _ in range(most + 1)]
    with screen("continuing held-out text with drafts and without", as_json=False) as listen:
        for number, prompt in enumerate(prompts):
            listen(Phase("generating", number, len(prompts), "prompts"))
            plain: list[int] = []
            for drafts, tally in enumerate(tallies):
                stream = TokenStream(model, prompt, max_new_tokens=new, drafts=drafts, stop_ids=())
                tokens = list(stream)
                plain = plain or tokens
                tally.add(stream, tokens == plain)
    return tallies


def report(tallies: Sequence[Tally], modules: int, prompts: int, context: int, new: int, called: Sequence[str]) -> str:
    rows = []
    for drafts, tally in enumerate(tallies):
        places = ", ".join(f"{a / p:.1%}" for a, p in zip(tally.accepted, tally.proposed, strict=True)) or "-"
        ratios = [plain / own for plain, own in zip(tallies[0].seconds, tally.seconds, strict=True)]
        rows.append(
            f"| {drafts} | {places} | {tally.tokens / sum(tally.seconds):.1f} | {statistics.median(ratios):.2f} "
            f"| {tally.same} of {prompts} | {tally.settled} |"
        )
    return f"""# What the drafts are worth

{prompts} windows of held-out text, each a prompt of {context} tokens that is continued greedily by {new}, without
drafts and with each number of them in turn. Prediction modules: {modules}; drafts beyond that apply the last one to
its own output. Drafts are never turned off here.

| drafts | accepted, 1st, 2nd, ... | tokens/s | times plain (median over prompts) | same tokens | near-ties settled |
|--:|--:|--:|--:|--:|--:|
{chr(10).join(rows)}

Command: `{shlex.join(["python", "-m", "bench.speculation", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


if __name__ == "__main__":
    leave_with(main)
