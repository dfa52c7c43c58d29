"""`cavelight look`: a page and pictures, of a run or of what is inside a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from cavelight.cli.progress import Listener, screen
from cavelight.cli.screen import OUT, say_json

if TYPE_CHECKING:
    from cavelight.see.run_report import Report


def look(source: str, out: Path | None, revision: str | None, as_json: bool) -> None:
    """`source` is a run's folder, a checkpoint's, or owner/name on the hub."""
    if is_run(Path(source)):
        look_at_run(Path(source), out, as_json)
    else:
        look_inside(source, out, revision, as_json)


def is_run(folder: Path) -> bool:
    """Whether `train` wrote it, and not only its model."""
    return (folder / "metrics.jsonl").is_file() or (folder / "recipe.json").is_file()


def look_at_run(run: Path, out: Path | None, as_json: bool) -> None:
    """The run's report, in RUN/report unless told; also while it is under way."""
    with screen(f"Looking at the run {run}", as_json) as listen:
        found = write_report(run, listen, out)
    if as_json:
        parts = [{"title": part.title, "finding": part.finding} for part in found.parts]
        say_json({"kind": "result", "page": found.page, "facts": found.facts, "parts": parts})
        return
    tell(found)


def write_report(
    run: Path,
    listen: Listener,
    out: Path | None = None,
    reference: Mapping[str, float] | None = None,
    title: str = "",
) -> "Report":
    """The report of a run's folder; reference: bits per byte to compare with."""
    from cavelight.see.run_report import report
    from cavelight.train.state import RunFolder, read_metrics

    return report(run, read_metrics(RunFolder(run).metrics), out, reference, title, listen)


def tell(found: "Report") -> None:
    """What stands out in a run, and where its page is."""
    OUT.print(Text("\n" + " · ".join(found.facts), style="bold"))
    for part in found.parts:
        OUT.print(Text.assemble("\n", (part.title, "bold cyan"), "\n", part.finding))
    OUT.print(f"\nThe page: {found.page}  (each figure lies beside it as SVG and PNG)", soft_wrap=True)


def look_inside(source: str, out: Path | None, revision: str | None, as_json: bool) -> None:
    """What a checkpoint holds; without `out` the page goes beside it."""
    from cavelight.disk import checkpoint_folder
    from cavelight.see.look import DATA
    from cavelight.see.look import look as inside
    from cavelight.weights.hub import local_folder
    from cavelight.weights.stored import Checkpoint

    with screen(f"Looking inside {source}", as_json) as listen:
        folder = checkpoint_folder(local_folder(source, revision, listen))
        page = inside(Checkpoint(folder), out or beside(source), listen)
    found = json.loads((page.parent / DATA).read_text(encoding="utf-8"))
    if as_json:
        say_json({"kind": "result", "page": page, **found})
        return
    for figure in found["figures"]:
        OUT.print(Text.assemble("\n", (figure["title"], "bold cyan"), "\n", figure["finding"]))
    pictures = sum(file.suffix == ".png" for file in page.parent.iterdir())
    OUT.print(f"\nThe page: {page}  ({pictures} pictures and the numbers, {DATA}, lie beside it)", soft_wrap=True)


def beside(source: str) -> Path:
    """Where the page goes unless told: NAME-look beside the folder, here for a checkpoint of the hub."""
    folder = Path(source)
    if folder.exists():
        folder = folder.resolve()
        return folder.with_name(f"{folder.name}-look")
    return Path(f"{source.partition('@')[0].rpartition('/')[2]}-look")
