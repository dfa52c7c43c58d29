"""`cavelight train`: a recipe in, a run's folder out, and a screen in between."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.text import Text

from cavelight.cli.look import write_report
from cavelight.cli.progress import screen
from cavelight.cli.screen import INTERRUPTED, OUT, duration, say_json
from cavelight.errors import UserError
from cavelight.spec.recipe import Recipe


def train(recipe: str | None, changes: Sequence[str], out: Path | None, resume: Path | None, as_json: bool) -> None:
    """A new run of `recipe` in `out`, or the run in `resume` continued. Leaves with 130 if Ctrl-C ended it."""
    if (recipe is None) == (resume is None):
        raise UserError(
            "Name either a recipe or a run to go on with",
            got="neither" if recipe is None else "both",
            do="write 'cavelight train RECIPE' or 'cavelight train --resume DIR'",
        )
    if resume is None:
        assert recipe is not None
        chosen = Recipe.read(recipe, changes)
        folder = out or Path("runs") / Path(recipe).stem
    else:
        if out is not None:
            raise UserError("A run goes on in its own folder", got=f"--out {out}", do="leave out --out")
        from cavelight.train.state import RunFolder

        chosen, folder = Recipe.build(RunFolder(resume).read_recipe().model_dump(), changes), resume

    from cavelight.train.loop import train as run

    with screen(f"training {chosen.model.preset} into {folder}", as_json) as listen:
        result = run(chosen, folder, listen, resume=resume is not None)
        page = None if result.interrupted else write_report(folder, listen).page
    if as_json:
        say_json({"kind": "result", **asdict(result), "report": page})
    else:
        OUT.print(Text(summary(result.steps, result.tokens, result.seconds, result.bits_per_byte)))
        OUT.print(f"The model: {result.model}", soft_wrap=True)
        OUT.print(f"The report: {page}" if page else f"Its report: cavelight look {folder}", soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def summary(steps: int, tokens: int, seconds: float, bits_per_byte: float | None) -> str:
    """A run in one sentence."""
    held_out = "" if bits_per_byte is None else f"; {bits_per_byte:.3f} bits per byte on all held-out text"
    return f"{steps:,} steps, {tokens:,} tokens in {duration(seconds)}{held_out}."
