"""(b) Multi-token prediction on and off: the main loss on held-out text, and how many drafts are accepted."""

from pathlib import Path
from typing import Any

from cavelight.experiment import pictures
from cavelight.experiment.page import plus_minus, signed, verdict
from cavelight.experiment.statistics import estimate
from cavelight.experiment.study import Listener, Outcome, Run, Told, bits
from cavelight.run.generate import TokenStream
from cavelight.see import style
from cavelight.spec.events import Phase
from cavelight.spec.recipe import Recipe
from cavelight.train.prepare import prepare
from cavelight.train.state import RunFolder
from cavelight.weights.snapshot import read_checkpoint

PROMPTS, NEW_TOKENS = 32, 48


def measure(recipe: Recipe, folder: RunFolder, on_event: Listener) -> dict[str, Any]:
    """Drafts proposed and accepted when held-out documents are continued greedily."""
    model = read_checkpoint(folder.model)
    if not model.mtp:
        return {}
    held, room = prepare(recipe, lambda event: None).held, model.config.max_position_embeddings - NEW_TOKENS - 2
    proposed = accepted = 0
    documents = range(min(PROMPTS, len(held.bytes_M)))
    for m in documents:
        on_event(Phase("drafting", m, len(documents), "prompts"))
        start, end = int(held.starts_M1[m]), int(held.starts_M1[m + 1]) - 1
        prompt = [int(token) for token in held.tokens_N[start : min(end, start + room)]]
        stream = TokenStream(model, prompt, max_new_tokens=NEW_TOKENS, drafts=1)
        for _ in stream:
            pass
        proposed, accepted = proposed + sum(stream.stats.proposed), accepted + sum(stream.stats.accepted)
    return {"proposed": proposed, "accepted": accepted}


def acceptance(run: Run) -> float:
    return float(run.found["accepted"] / max(run.found["proposed"], 1))


def tell(outcome: Outcome) -> Told:
    off, *others = outcome.study.variants
    head = ("MTP", "bits per byte", "less those of none", "drafts accepted")
    rows, said = [(off.label, plus_minus(outcome.of(off.key, bits)), "", "")], []
    for variant in others:
        difference, drafts = outcome.difference(variant.key, bits), outcome.of(variant.key, acceptance)
        accepted = plus_minus(estimate([100 * value for value in outcome.values(variant.key, acceptance)]), 1)
        rows.append((variant.label, plus_minus(outcome.of(variant.key, bits)), signed(difference), f"{accepted} %"))
        said.append(
            f"{verdict(difference, f'MTP with {variant.label}', 'none', 'bits per byte')} "
            f"{drafts.mean:.0%} of its drafts are accepted; the report has 85 to 90 %."
        )
    return Told((head, *rows), said)


def draw(outcome: Outcome, path: Path) -> None:
    variants = outcome.study.variants
    with style.sheet(path, 7.0, 3.5) as figure:
        style.heading(figure, outcome.study.title, [pictures.ERRORS])
        axes = style.panel(figure, 0.65, 1.05, 2.7, 2.0)
        style.entitle(axes, "Next token, held-out text", "bits per byte")
        pictures.columns(
            axes,
            [variant.label for variant in variants],
            [outcome.values(variant.key, bits) for variant in variants],
            [outcome.of(variant.key, bits) for variant in variants],
            pictures.COLORS[: len(variants)],
        )
        axes = style.panel(figure, 4.25, 1.05, 2.1, 2.0)
        style.entitle(axes, "Drafts accepted", "of those proposed")
        pictures.columns(
            axes,
            [variant.label for variant in variants[1:]],
            [outcome.values(variant.key, acceptance) for variant in variants[1:]],
            [outcome.of(variant.key, acceptance) for variant in variants[1:]],
            pictures.COLORS[1 : len(variants)],
        )
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.axhline(0.85, color=style.INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(-0.55, 0.86, "the report's 85 %", size=8, va="bottom")
