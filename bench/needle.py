"""Needles at 32K and at 128K: a small model trained, extended in phases and asked, and what its cache held.

python -m bench.needle writes docs/results/needle.md with the heat map. Every part is done once: interrupted, the same
command goes on.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.provenance import commit, leave_with, machine, some
from cavelight.api import load
from cavelight.cli.evaluation import held_out_tokens, report_needles
from cavelight.cli.progress import screen
from cavelight.cli.screen import duration
from cavelight.disk import checkpoint_folder, file_beside
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import total_parameters
from cavelight.spec.recipe import Recipe
from cavelight.train.extend import extend, length_name
from cavelight.train.loop import train
from cavelight.train.needle import Found, find_needles, plain_text
from cavelight.train.state import RunFolder, read_metrics

# Steps and rates of so small a model, about 4,096 tokens a step or one row. The first three phases are there because
# the model learnt from so short a context: one four times as long needs little training, one far longer much.
FALLING = 'train.schedule=[{share=0.5,to=1.0},{share=0.5,to=0.1,shape="linear"}]'
PHASES = {
    512: ("train.steps=150", "train.learning_rate=3e-3"),
    2_048: ("train.steps=60", "train.learning_rate=2e-3"),
    8_192: ("train.steps=90", "train.learning_rate=3e-3", FALLING),
    # A row of 16K shows far things at a quarter of the attention that one of 32K costs.
    32_768: ("train.steps=70", "train.learning_rate=2e-3", FALLING, "data.row_length=16384"),
    131_072: ("train.steps=1", "train.learning_rate=1e-5", "data.row_length=2048"),
}
# Phases whose models are asked, at which lengths, and how many needles in each cell: a haystack of 128K takes minutes.
SEEN = {32_768: ((2_048, 8_192, 32_768), 40), 131_072: ((32_768, 131_072), 10)}
DEPTHS = 10
HEAD = """| tokens | found | worst depth | haystacks | time | cache bytes | planned |
|--:|--:|--:|--:|--:|--:|--:|"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train, extend to 32K and 128K, look for needles.")
    parser.add_argument("--run", type=Path, default=Path("runs/needle"), help="where the run goes (runs/needle)")
    parser.add_argument("--threads", type=some, default=2, help="torch's threads (2)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    models = trained(options.run)
    if models is None:
        return 130
    tables, summary = [], []
    for length, (lengths, trials) in SEEN.items():
        folder = models[length]
        name = f"needle-{length_name(length)}"
        rows = asked(folder, lengths, trials, options.out, name)
        tables.append(f"![Needles found by length and depth]({name}.png)\n\n{table(rows)}")
        summary.append(f"{min(found / of for found, of in zip(rows[-1]['found'], rows[-1]['asked'], strict=True)):.1%}")
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "needle.md"
    with file_beside(page) as scratch:
        scratch.write_text(report(options.run, models, tables, summary, called), encoding="utf-8")
    print(f"wrote {page}")
    return 0


def trained(path: Path) -> dict[int, Path] | None:
    """The folders of the extended models by their context; None if Ctrl-C stopped a part. What is there stays."""
    run, folders = RunFolder(path), dict[int, Path]()
    with screen("Needles: a short context, then 32K, then 128K", as_json=False) as listen:
        if not run.holds_a_run or not finished(run):
            recipe = run.read_recipe() if run.holds_a_run else Recipe.read("needle")
            if train(recipe, run.path, listen, resume=run.holds_a_run).interrupted:
                return None
        source = run.path
        for length, changes in PHASES.items():
            (result,) = extend(source, [length], run.path, [*changes, "train.evaluate_every=1000"], listen)
            if result.interrupted:
                return None
            folders[length] = source = result.out
    return folders


def finished(run: RunFolder) -> bool:
    return any(line["kind"] == "evaluated" and line["whole"] for line in read_metrics(run.metrics))


def asked(folder: Path, lengths: Sequence[int], trials: int, out: Path, name: str) -> list[dict[str, Any]]:
    """What the model in `folder` finds, with its heat map drawn; kept beside it, and read from there once it is."""
    kept = folder / f"needle-{trials}.json"
    if not kept.exists():
        model, tokenizer = load(folder, torch.float32)
        with screen(f"Needles in {folder}", as_json=False) as listen:
            hay = held_out_tokens(folder, None, tokenizer, listen).tokens_N[: max(lengths)]
            text = plain_text(tokenizer, hay.tolist())
            results = find_needles(model, tokenizer, text, lengths, depths=DEPTHS, trials=trials, on_event=listen)
        with file_beside(kept) as scratch:
            scratch.write_text(json.dumps([asdict(result) for result in results]), encoding="utf-8")
    results = [Found(**row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    config = ModelConfig.read(checkpoint_folder(folder))
    with TemporaryDirectory() as scratch_folder:
        rows, picture = report_needles(results, config, Path(scratch_folder), f"extended to {folder.name}")
        with file_beside(out / f"{name}.png") as scratch:
            scratch.write_bytes(picture.read_bytes())
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        shares = [found / of for found, of in zip(row["found"], row["asked"], strict=True)]
        cells = (
            f"{row['length']:,}",
            f"{sum(row['found'])} of {sum(row['asked'])}",
            f"{min(shares):.1%}",
            str(row["haystacks"]),
            duration(row["seconds"]),
            f"{row['cache_bytes']:,}",
            f"{row['planned_cache_bytes']:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([HEAD, *lines])


def report(
    path: Path, models: dict[int, Path], tables: Sequence[str], summary: Sequence[str], called: Sequence[str]
) -> str:
    config = ModelConfig.read(checkpoint_folder(path))
    training = []
    for folder in (path, *models.values()):
        run = RunFolder(folder)
        last = [line for line in read_metrics(run.metrics) if line["kind"] == "step"][-1]
        recipe = run.read_recipe()
        training.append(
            f"| {recipe.config.max_position_embeddings:,} | {recipe.data.row_length:,} "
            f"| {last['step']:,} | {last['tokens']:,} | {recipe.train.learning_rate:g} "
            f"| {duration(last['seconds'])} |"
        )
    return f"""# Needles at 32K and 128K

A DeepSeek-V3 of {total_parameters(config):,} parameters ({config.num_hidden_layers} layers, one of them dense,
{config.num_attention_heads} heads, a latent of {config.kv_lora_rank}) learns to find facts again within
{config.max_position_embeddings} tokens (`recipes/needle.toml`), and is extended with YaRN in the phases below.
A needle reads `Friends call Bana otter lemon.`; the question is `Friends call Bana`, and found means that the greedy
continuation is ` otter lemon` (one of 4,096). Each depth is a tenth of the haystack. Up to a hundred needles share a
haystack, which makes it harder: each distracts from the others. In the worst depth, {summary[0]} are found at 32K by
the model extended to 32K, {summary[1]} at 128K by the one extended to 128K.

| context | rows of | steps | tokens | peak rate | training |
|--:|--:|--:|--:|--:|--:|
{chr(10).join(training)}

## Extended to 32K

{tables[0]}

## Extended to 128K

{tables[1]}

The cache is what `LatentCache` held of one haystack; planned is `plan.memory.decoding_memory`'s, both in float32.

Command: `{shlex.join(["python", "-m", "bench.needle", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


if __name__ == "__main__":
    leave_with(main)
