"""`cavelight eval --tasks`: lm-evaluation-harness' tasks on a checkpoint."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cavelight.cli.generation import load
from cavelight.cli.progress import screen
from cavelight.cli.screen import OUT, duration, say_json
from cavelight.errors import UserError

if TYPE_CHECKING:
    from cavelight.harness import Score


def tasks(
    model_dir: Path,
    names: Sequence[str],
    limit: int | None,
    include: Path | None,
    shots: int | None,
    dtype: str,
    without_mtp: bool,
    as_json: bool,
) -> None:
    """Scores of these tasks. include: a folder with tasks of one's own. shots: None takes each task's number."""
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError("No task is named", do="write for example --tasks arc_easy,hellaswag")
    if limit is not None and limit < 1:
        raise UserError("The limit of documents has to be 1 or more", got=str(limit))
    if shots is not None and shots < 0:
        raise UserError("The number of worked examples has to be 0 or more", got=str(shots))
    try:
        from cavelight import harness
    except ModuleNotFoundError as error:
        if error.name not in ("lm_eval", "datasets"):
            raise
        raise UserError(
            "Tasks need lm-evaluation-harness, which is not installed", do="pip install 'cavelight[eval]'"
        ) from error

    import torch

    from cavelight.train.workers import Workers

    model, tokenizer = load(model_dir, dtype, without_mtp)
    began = time.monotonic()
    with screen(f"{model_dir} on {', '.join(names)}", as_json) as listen:
        workers = Workers(torch.get_num_threads())
        scores = harness.evaluate(model, tokenizer, names, limit, include, shots, listen, workers)
    seconds = time.monotonic() - began
    if as_json:
        say_json({"kind": "result", "scores": [asdict(score) for score in scores], "seconds": seconds})
        return
    OUT.print(_table(scores))
    OUT.print(f"in {duration(seconds)}", style="dim")


def _table(scores: Sequence["Score"]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("value", "± error", "documents", "shots"):
        table.add_column(heading, justify="right")
    for score in scores:
        error = "" if score.error is None else f"{score.error:.4f}"
        table.add_row(score.task, score.metric, f"{score.value:.4f}", error, f"{score.documents:,}", str(score.shots))
    return table
