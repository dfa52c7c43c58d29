"""`cavelight look`: a page and pictures of what is inside a checkpoint."""

import json
from pathlib import Path

from rich.text import Text

from cavelight.cli.progress import screen
from cavelight.cli.screen import OUT, say_json


def look(source: str, out: Path | None, revision: str | None, as_json: bool) -> None:
    """`source` is a checkpoint's folder, a run's, or owner/name on the hub; without `out` the page goes beside it."""
    from cavelight.disk import checkpoint_folder
    from cavelight.see.look import DATA
    from cavelight.see.look import look as look_inside
    from cavelight.weights.hub import local_folder
    from cavelight.weights.stored import Checkpoint

    with screen(f"Looking inside {source}", as_json) as listen:
        folder = checkpoint_folder(local_folder(source, revision, listen))
        page = look_inside(Checkpoint(folder), out or beside(source), listen)
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
