"""`cavelight doctor`: what is wrong with a checkpoint, as a table of verdicts or as JSON."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from cavelight.cli.progress import screen
from cavelight.cli.screen import OUT, duration, say_json
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.spec.events import Note, Saved

if TYPE_CHECKING:
    from cavelight.doctor.findings import Finding, Verdict

STYLES: "dict[Verdict, str]" = {"fail": "bold red", "warn": "yellow", "pass": "green"}
SUMMARY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "n_routed_experts",
    "num_experts_per_tok",
)


def doctor(
    source: str, level: str, against: str | None, text: Path | None, store: bool, revision: str | None, as_json: bool
) -> None:
    """Examine, show what was found and leave with 1 if anything fails. UserError where there is no checkpoint."""
    from cavelight.disk import checkpoint_folder
    from cavelight.doctor.examine import LEVELS, examine
    from cavelight.doctor.findings import worst_first
    from cavelight.weights.hub import local_folder

    if level not in LEVELS:
        raise UserError(f"There is no level {level!r}", do=f"choose one of {', '.join(LEVELS)}")
    if store and level != "model":
        raise UserError("--store needs --level model", why="only running the model shows what its MTP is fed")
    if text is not None and level != "model" and against is None:
        raise UserError("--text needs --level model or --against", why="nothing else reads a text")
    words = None if text is None else _read(text)
    began = time.monotonic()
    with screen(f"examining {source}", as_json) as listen:
        folder = checkpoint_folder(local_folder(source, revision, listen))
        findings = worst_first(examine(folder, level, words, against, listen))
        if store:
            said = store_hidden(folder, findings)
            listen(Saved(folder / "config.json", said) if said else Note("--store: mtp_hidden stays as it was"))
    seconds = time.monotonic() - began
    if as_json:
        say_json(_report(folder, level, findings, seconds))
    else:
        _show(findings, seconds)
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)


def store_hidden(folder: Path, findings: Sequence["Finding"]) -> str | None:
    """Write into config.json which hidden state MTP was found to want; what was written, None if nothing."""
    for finding in findings:
        better = finding.value.get("better")
        file = folder / "config.json"
        if finding.check == "mtp-hidden" and better is not None and better != _config(folder).get("mtp_hidden"):
            raw = _config(folder) | {"mtp_hidden": better}  # also where silence means the same: now it is known
            with file_beside(file) as scratch:
                scratch.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return f"mtp_hidden is now {better}"
    return None


def _show(findings: Sequence["Finding"], seconds: float) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("verdict", "check", "trap"):
        table.add_column(column, no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for finding in findings:
        style = STYLES[finding.verdict]
        trap = "" if finding.trap is None else str(finding.trap)
        table.add_row(Text(finding.verdict, style=style), finding.check, trap, Text(finding.sentence))
    OUT.print(table)
    counts = Counter(finding.verdict for finding in findings)
    said = ", ".join(f"[{STYLES[verdict]}]{counts[verdict]} {verdict}[/]" for verdict in STYLES)
    OUT.print(f"\n{said}, in {duration(seconds)}")


def _report(folder: Path, level: str, findings: Sequence["Finding"], seconds: float) -> dict[str, object]:
    """The one object of --json."""
    counts = Counter(finding.verdict for finding in findings)
    config = _config(folder)
    return {
        "kind": "result",
        "folder": folder,
        "level": level,
        "seconds": seconds,
        "counts": {verdict: counts[verdict] for verdict in STYLES},
        "config": {key: config.get(key) for key in SUMMARY},
        "findings": [
            {"check": f.check, "verdict": f.verdict, "sentence": f.sentence, "trap": f.trap, "value": f.value}
            for f in findings
        ],
    }


def _config(folder: Path) -> dict[str, object]:
    """config.json as far as it can be read, which is for the findings to say."""
    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{text} cannot be read as text", got=str(error), do="give a file of text in UTF-8") from error
