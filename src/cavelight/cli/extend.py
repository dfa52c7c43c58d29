"""`cavelight extend`: a longer context, one phase after another."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.text import Text

from cavelight.cli.progress import screen
from cavelight.cli.screen import INTERRUPTED, OUT, say_json
from cavelight.cli.training import summary


def extend(run: Path, to: Sequence[str], changes: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Each phase is a run's folder in `out`, RUN/extended unless told. Leaves with 130 if Ctrl-C ended it."""
    from cavelight.plan.table import tokens_of
    from cavelight.train.extend import extend as extend_run
    from cavelight.train.state import RunFolder

    lengths = [tokens_of(length) for length in to]
    with screen(f"extending {run} to {', '.join(to)}", as_json) as listen:
        results = extend_run(run, lengths, out or RunFolder.of(run).path / "extended", changes, listen)
    for result in results:
        if as_json:
            say_json({"kind": "result", **asdict(result)})
        else:
            OUT.print(Text(summary(result.steps, result.tokens, result.seconds, result.bits_per_byte)))
            OUT.print(f"The model: {result.model}", soft_wrap=True)
    if results[-1].interrupted:
        raise typer.Exit(INTERRUPTED)
