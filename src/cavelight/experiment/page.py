"""The page of an experiment: what was asked, the table, the figure, the verdict, and where the numbers come from."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from cavelight.disk import file_beside
from cavelight.experiment.statistics import LEVEL, Estimate
from cavelight.experiment.study import Outcome, Told
from cavelight.see.figure import number


def write_page(outcome: Outcome, told: Told, figure: Path, page: Path, command: str) -> None:
    """docs/results/experiments/NAME.md; `figure` lies beside it."""
    study, runs = outcome.study, [run for each in outcome.runs.values() for run in each]
    seeds = len(next(iter(outcome.runs.values())))
    first = study.variants[0].recipe
    tokens = first.train.rows_per_step * first.data.row_length
    minutes = sum(run.found["seconds"] for run in runs) / 60
    trained = f"with {seeds} seeds" if seeds > 1 else "once"
    setting = f"Each variant was trained {trained}, {first.train.steps:,} steps of {tokens:,} tokens."
    if seeds > 1:
        setting += f""" After ± stands the standard error
over the seeds. Differences are taken seed by seed, on the same rows of text in the same order; the range in brackets is
their {LEVEL:.0%} t-interval with {number(seeds - 1, "degree")} of freedom. Each interval stands for itself: of twenty
differences that are none, one would seem to be one."""
    work = f"{len(runs)} runs of one thread each, {minutes:,.0f} minutes of one core in all"
    origin = [f"Command: `{command}` ({work})"]
    origin += [f"Commit: {_all(run.found['commit'] for run in runs)}"]
    origin += [f"Machine: {_all(run.found['machine'] for run in runs)}"]
    parts = [
        f"# {study.title}",
        study.question,
        f"![{study.title}]({figure.name})",
        table(told.table),
        "\n".join(f"- {sentence}" for sentence in told.verdict),
        f"{setting}\n{study.setting}".strip(),
        "  \n".join(origin),
    ]
    with file_beside(page) as scratch:
        scratch.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(rows: Sequence[Sequence[str]]) -> str:
    """In Markdown: the first row is the head, the first column words, all others numbers."""
    head, *body = rows
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plus_minus(found: Estimate, digits: int = 4) -> str:
    """1.8123 ± 0.0021, the latter the standard error; without it where there is one seed."""
    return f"{found.mean:.{digits}f}" + (f" ± {found.error:.{digits}f}" if math.isfinite(found.error) else "")


def signed(found: Estimate, digits: int = 4) -> str:
    """+0.0121 [+0.0040, +0.0202]: a difference and its interval."""
    text = f"{found.mean:+.{digits}f}"
    text += f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]" if math.isfinite(found.half) else ""
    return text.replace("-", "−")


def verdict(
    found: Estimate, this: str, than: str, unit: str, more: str = "more", less: str = "fewer", digits: int = 4
) -> str:
    """What a paired difference allows to be said, in a sentence; `more` and `less` are the words for its signs."""
    if found.count < 2:
        text = f"{this} against {than}: {signed(found, digits)} {unit}, of a single seed, which says nothing of chance."
    elif found.sign:
        text = f"{this} has {more if found.sign > 0 else less} {unit} than {than}: {signed(found, digits)}."
    else:
        text = f"No difference in {unit} appears at this size between {this} and {than}: {signed(found, digits)}."
    return capital(text)


def capital(text: str) -> str:
    """The text as a sentence begins; all else stays as it is."""
    return text[0].upper() + text[1:]


def _all(values: Iterable[str]) -> str:
    """Each value once."""
    return "; ".join(dict.fromkeys(values))
