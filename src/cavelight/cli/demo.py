"""`cavelight demo`: the tour. Train, export, read back, measure against xz, generate with drafts and without, draw.

Every stage calls what the library offers to everybody; only the choice of prompts and the arithmetic of the
comparison are the tour's own.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from cavelight.cli.generation import load, show
from cavelight.cli.look import write_report
from cavelight.cli.progress import screen
from cavelight.cli.screen import ERR, INTERRUPTED, OUT, duration, say_json
from cavelight.disk import file_beside
from cavelight.spec.events import Note, Phase
from cavelight.spec.recipe import Recipe

if TYPE_CHECKING:
    from cavelight.data.corpus import Corpus
    from cavelight.data.read import Document
    from cavelight.data.tokenizer import Tokenizer
    from cavelight.model.transformer import Transformer
    from cavelight.run.stats import Stats
    from cavelight.train.loop import Result

PROMPTS = 8
PROMPT_CHARACTERS = 1200
NEW_TOKENS = 96
FUNCTION = re.compile(r"^ *def \w+\(", re.MULTILINE)


def demo(out: Path, changes: Sequence[str], as_json: bool) -> None:
    """Leaves a run's folder at `out`, with figures and demo.json. A run that is there already is gone on with."""
    began = time.monotonic()
    recipe, result = train(out, changes, as_json)
    bits = result.bits_per_byte

    from cavelight.train.prepare import read_corpora

    model, tokenizer = load(out, "float32")  # what the run exported; in float32, tokens are the same with drafts
    corpora = list(read_corpora(recipe.data).values())
    compressed = compress(corpora)
    prompts = held_out_prompts((document for corpus in corpora for document in corpus.held), model, tokenizer)
    if not as_json:
        sample(model, tokenizer, prompts[0])
    speed = compare(model, prompts, as_json)
    files = draw(out, model, compressed, speed, as_json)
    seconds = {"training": result.seconds, "whole": time.monotonic() - began}
    found = {"bits_per_byte": bits, "xz": compressed, "speed": speed.as_dict(), "seconds": seconds, "files": files}
    with file_beside(out / "demo.json") as scratch:
        scratch.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    if as_json:
        say_json({"kind": "result", **found})
    else:
        conclude(out, bits, compressed, speed, files)
        OUT.print(f"Training took {duration(seconds['training'])}, the whole tour {duration(seconds['whole'])}.")
    if not speed.identical:
        raise typer.Exit(1)


def train(out: Path, changes: Sequence[str], as_json: bool) -> "tuple[Recipe, Result]":
    """What was trained, and how it ended; leaves if Ctrl-C ended it."""
    from cavelight.train.loop import train as run
    from cavelight.train.state import RunFolder

    folder = RunFolder(out)
    resume = folder.holds_a_run
    recipe = Recipe.build(folder.read_recipe().model_dump(), changes) if resume else Recipe.read("demo", changes)
    with screen("Training a small DeepSeek-V3", as_json) as listen:
        if resume:
            listen(Note(f"{out} holds a run already: going on with it. Delete the folder to start anew."))
        result = run(recipe, out, listen, resume)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    return recipe, result


def compress(corpora: "Sequence[Corpus]") -> dict[str, float]:
    """Bits per byte of xz -9e on the held-out modules, alone and after it has seen the training files."""
    from cavelight.data.corpus import xz_bits_per_byte

    def documents(part: str) -> "Iterator[Document]":
        return chain.from_iterable(getattr(corpus, part) for corpus in corpora)

    with ERR.status("xz -9e compresses the held-out text, then the training files with it"):
        alone = xz_bits_per_byte(documents("held"))
        return {"alone": alone, "seen": xz_bits_per_byte(documents("held"), seen=documents("train"))}


def held_out_prompts(held: "Iterable[Document]", model: "Transformer", tokenizer: "Tokenizer") -> list[list[int]]:
    """Held-out text up to where a function begins, from PROMPTS modules; the beginnings of texts without functions."""
    from cavelight.run.generate import begin

    functions, beginnings = [], []
    for document in held:
        beginnings.append(document.text[: min(PROMPT_CHARACTERS, len(document.text) // 2)])
        if found := FUNCTION.search(document.text, PROMPT_CHARACTERS):
            functions.append(document.text[found.end() - PROMPT_CHARACTERS : found.end()])
        if len(functions) == PROMPTS:
            break
    room = model.config.max_position_embeddings - NEW_TOKENS - 1
    texts = (functions or beginnings)[:PROMPTS]
    return [begin(model.config) + tokenizer.encode(text)[-room:] for text in texts]


def sample(model: "Transformer", tokenizer: "Tokenizer", prompt: list[int]) -> None:
    """Stream one continuation to the screen."""
    from cavelight.api import generate

    OUT.print("\n[bold]It goes on from a held-out module like this:[/]")
    OUT.print(Text("\n".join(tokenizer.decode(prompt).splitlines()[-8:]), style="dim"), end="", soft_wrap=True)
    stream = generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS)
    show(stream, [])
    ERR.print(Text(stream.stats.report(), style="cyan"), soft_wrap=True)


@dataclass(frozen=True)
class Speed:
    """The same prompts decoded greedily with drafts and without."""

    with_drafts: dict[str, Any]
    without: dict[str, Any]
    identical: bool

    @property
    def ratio(self) -> float:
        """How many times as fast it is with drafts; 1 where there was nothing to decode."""
        with_drafts, without = self.with_drafts["tokens_per_second"], self.without["tokens_per_second"]
        return float(with_drafts / without) if without else 1.0

    @property
    def acceptance(self) -> list[float]:
        """The share of accepted drafts, one, two, ... places ahead."""
        both = zip(self.with_drafts["accepted"], self.with_drafts["proposed"], strict=True)
        return [accepted / proposed for accepted, proposed in both]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio, "acceptance": self.acceptance}


def compare(model: "Transformer", prompts: Sequence[list[int]], as_json: bool) -> Speed:
    """Each prompt twice in turn, so that whatever else the machine does meets both alike."""
    from cavelight.run.generate import TokenStream

    drafted, plain, identical = [], [], True
    with screen("Generating with the model's own drafts, and without", as_json) as listen:
        for number, prompt in enumerate(prompts):
            listen(Phase("generating", number, len(prompts), "prompts"))
            with_drafts = TokenStream(model, prompt, max_new_tokens=NEW_TOKENS)
            without = TokenStream(model, prompt, max_new_tokens=NEW_TOKENS, drafts=0)
            identical &= list(with_drafts) == list(without)
            drafted.append(with_drafts.stats)
            plain.append(without.stats)
        listen(Phase("generating", len(prompts), len(prompts), "prompts"))
    return Speed(together(drafted), together(plain), identical)


def together(runs: "Sequence[Stats]") -> dict[str, Any]:
    """Several generations as one, in the form of Stats.as_dict."""
    from cavelight.run.stats import Stats, added

    whole = Stats(prompt_tokens=sum(run.prompt_tokens for run in runs), drafts=max(run.drafts for run in runs))
    for run in runs:
        whole.new_tokens += run.new_tokens
        whole.prefill_seconds += run.prefill_seconds
        whole.decode_seconds += run.decode_seconds
        whole.plain_seconds += run.plain_seconds
        whole.round_seconds += run.round_seconds
        whole.round_tokens += run.round_tokens
        whole.settled += run.settled
        whole.proposed = added(whole.proposed, run.proposed)
        whole.accepted = added(whole.accepted, run.accepted)
    whole.off = runs[-1].off if all(run.off for run in runs) else None
    whole.without_native = runs[-1].without_native
    decoded = sum(run.new_tokens - 1 for run in runs)  # the first token of each came with its prompt
    rate = decoded / whole.decode_seconds if whole.decode_seconds else 0.0
    return whole.as_dict() | {"tokens_per_second": rate}


def draw(out: Path, model: "Transformer", compressed: dict[str, float], speed: Speed, as_json: bool) -> dict[str, Path]:
    """The figures of the tour, by what they show."""
    from cavelight.see.draw import draw_architecture, draw_speculation
    from cavelight.train.state import RunFolder

    folder = RunFolder(out)
    files = {name: out / f"{name}.png" for name in ("speculation", "architecture")}
    reference = {"xz -9e": compressed["alone"], "xz after the training files": compressed["seen"]}
    with screen("Drawing", as_json) as listen:
        page = write_report(out, listen, reference=reference, title="A small DeepSeek-V3").page
    draw_speculation(speed.with_drafts, speed.without, files["speculation"])
    draw_architecture(model.config, files["architecture"])
    return {"checkpoint": folder.model, "metrics": folder.metrics, "report": page, **files}


def conclude(out: Path, bits: float | None, compressed: dict[str, float], speed: Speed, files: dict[str, Path]) -> None:
    """What was found, and where everything lies."""
    table = Table(show_header=False, title="What the tour found", title_justify="left")
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column(style="dim", overflow="fold")
    table.add_row("this model", f"{bits:.3f}", "bits per byte on modules that it never saw")
    table.add_row("xz -9e", f"{compressed['alone']:.3f}", "on the same modules")
    table.add_row("xz -9e", f"{compressed['seen']:.3f}", "on the same, having read the training files first")
    table.add_section()
    table.add_row("with drafts", f"{speed.with_drafts['tokens_per_second']:.1f}", "tokens a second, greedy")
    table.add_row(
        "without", f"{speed.without['tokens_per_second']:.1f}", f"so drafts make it {speed.ratio:.2f} times as fast"
    )
    for ahead, share in enumerate(speed.acceptance, start=1):
        table.add_row(f"drafts {ahead} ahead", f"{share:.0%}", "accepted")
    same = (
        "the same with drafts and without"
        if speed.identical
        else "DIFFERENT with drafts: this is a bug, please report it"
    )
    table.add_row("tokens", "=" if speed.identical else "≠", same)
    OUT.print()
    OUT.print(table)
    places = Table.grid(padding=(0, 2))
    for name, path in files.items():
        places.add_row(Text(name, style="cyan"), str(path))
    OUT.print(places)
    OUT.print(f"\nGo on with it:  cavelight generate {out} -p 'def read('", soft_wrap=True)
