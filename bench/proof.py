"""Two hours of training: what the demo's model comes to on modules that it never saw.

python -m bench.proof trains recipes/proof.toml into runs/proof and writes docs/results/proof.md, with the run's report
and curve beside it. Interrupted, the same command goes on; a run that is through is only looked at.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.provenance import commit, leave_with, machine
from cavelight.api import load
from cavelight.cli.demo import NEW_TOKENS, Speed, compare, compress, held_out_prompts
from cavelight.cli.look import write_report
from cavelight.cli.progress import screen
from cavelight.cli.screen import duration
from cavelight.disk import file_beside
from cavelight.spec.recipe import Recipe
from cavelight.train.loop import train
from cavelight.train.prepare import read_corpora
from cavelight.train.state import RunFolder, read_metrics

ASKED = 1.29  # bits per byte


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the demo's model for two hours and look at what it came to.")
    parser.add_argument("--run", type=Path, default=Path("runs/proof"), help="where the run goes (runs/proof)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where page, report and curve go")
    options = parser.parse_args(arguments)
    run = RunFolder(options.run)
    if not run.holds_a_run or whole(run) is None:
        recipe = run.read_recipe() if run.holds_a_run else Recipe.read("proof")
        with screen("The proof: two hours of training", as_json=False) as listen:
            if train(recipe, run.path, listen, resume=run.holds_a_run).interrupted:
                return 130
    looked = whole(run)
    assert looked is not None
    recipe = run.read_recipe()
    corpora = list(read_corpora(recipe.data).values())
    xz = compress(corpora)
    model, tokenizer = load(run.path, torch.float32)
    prompts = held_out_prompts((document for corpus in corpora for document in corpus.held), model, tokenizer)
    speed = compare(model, prompts, as_json=False)
    reference = {"xz -9e": xz["alone"], "xz after the training files": xz["seen"], "asked": ASKED}
    with TemporaryDirectory() as scratch_folder, screen("Drawing", as_json=False) as listen:
        page = write_report(run.path, listen, Path(scratch_folder), reference, "The demo's model, two hours").page
        for found, name in ((page, "proof.html"), (page.parent / "run.png", "proof.png")):
            with file_beside(options.out / name) as scratch:
                shutil.copyfile(found, scratch)
    called = list(sys.argv[1:] if arguments is None else arguments)
    text = report(run, looked, xz, speed, called)
    with file_beside(options.out / "proof.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
    print(f"wrote {options.out / 'proof.md'}")
    return 0 if looked["bits_per_byte"] < ASKED and speed.identical else 1


def whole(run: RunFolder) -> dict[str, Any] | None:
    """The look at all held-out text with which a run ends; None while it has not."""
    looks = [line for line in read_metrics(run.metrics) if line["kind"] == "evaluated"]
    return looks[-1] if looks and looks[-1]["whole"] else None


def report(run: RunFolder, looked: dict[str, Any], xz: dict[str, float], speed: Speed, called: Sequence[str]) -> str:
    recipe = run.read_recipe()
    steps = [line for line in read_metrics(run.metrics) if line["kind"] == "step"]
    last, tail = steps[-1], steps[-len(steps) // 10 :]
    accepted = ", ".join(
        f"{a} of {p}" for a, p in zip(speed.with_drafts["accepted"], speed.with_drafts["proposed"], strict=True)
    )
    bits = looked["bits_per_byte"]
    verdict = "beats" if bits < ASKED else "does not reach"
    return f"""# Two hours of training

The demo's model, with {recipe.data.row_length:,} tokens of context, after
{duration(last["seconds"])} of training (`recipes/proof.toml`): {bits:.3f} bits per byte on all held-out modules, which
{verdict} the {ASKED} that were asked. [The whole report](proof.html).

![The run](proof.png)

| | |
|---|--:|
| steps, tokens | {last["step"]:,}, {last["tokens"]:,} |
| bits per byte on all held-out modules, context up to {recipe.data.row_length:,} tokens | {bits:.3f} |
| `xz -9e` on the same modules | {xz["alone"]:.3f} |
| `xz -9e` on the same modules, having read the training files | {xz["seen"]:.3f} |
| training loss, mean of the last tenth of the steps (nats a token) | {fmean(line["loss"] for line in tail):.3f} |
| MaxVio of the worst layer, mean of the last tenth | {fmean(max(line["max_vio"]) for line in tail):.2f} |
| drafts accepted ({speed.with_drafts["prompt_tokens"]:,} held-out prompt tokens, {NEW_TOKENS} new ones each, greedy) \
| {accepted} |
| tokens per second with drafts, without (eager, float32) | {speed.with_drafts["tokens_per_second"]:.1f}, \
{speed.without["tokens_per_second"]:.1f} |
| tokens with drafts equal to those without | {"all" if speed.identical else "NOT ALL"} |

Command: `{shlex.join(["python", "-m", "bench.proof", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


if __name__ == "__main__":
    leave_with(main)
