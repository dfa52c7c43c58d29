"""`cavelight bench`: how fast a model runs here, and which share of what the machine could do that is."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.table import Table

from cavelight.cli.evaluation import beside, write_json
from cavelight.cli.generation import load
from cavelight.cli.progress import screen
from cavelight.cli.screen import OUT, say_json
from cavelight.errors import UserError

if TYPE_CHECKING:
    from cavelight.bench.sweep import Peer, Row
    from cavelight.model.transformer import Transformer

SEED = 0  # of the random weights of a preset
STD = 0.02


def bench(
    source: str,
    prompts: str,
    depths: str,
    batches: str,
    against: str | None,
    out: Path | None,
    dtype: str,
    as_json: bool,
) -> None:
    """`source`: a run, a checkpoint, or the name of a preset, which is measured with random weights."""
    from cavelight.bench.picture import draw_bench
    from cavelight.bench.sweep import cases, sweep
    from cavelight.plan.table import tokens_of
    from cavelight.train.provenance import machine

    if against not in (None, "transformers"):
        raise UserError("There is no such peer", got=str(against), do="write --against transformers")
    model = opened(source, dtype)
    numbers = [
        [0 if part == "0" else tokens_of(part) for part in text.split(",") if part]
        for text in (prompts, depths, batches)
    ]
    wanted = cases(model.config.max_position_embeddings, *numbers)
    with TemporaryDirectory() as scratch, screen(f"Measuring {source}", as_json) as listen:
        peer = peer_of(source, model, Path(scratch)) if against else None
        rows = sweep(model, wanted, peer, on_event=listen)
    if not rows:
        raise UserError("Nothing was measured", why="no prompt and no depth fits the model's context")
    folder = out or (beside(Path(source)) if Path(source).exists() else Path("."))
    probes, weight = rows[0].probes, model.lm_head.weight
    found = {
        "model": source,
        "machine": machine(weight.dtype),
        "probes": {"read": probes.read, "float32": probes.float32, "bfloat16": probes.bfloat16},
        "cases": [row.as_dict() for row in rows],
    }
    write_json(folder / "bench.json", found)
    facts = [machine(weight.dtype), f"reads {probes.read / 1e9:.1f} GB/s", f"peak {probes.peak / 1e12:.2f} Tflop/s"]
    draw_bench(rows, folder / "bench.png", f"What a token of {Path(source).name} costs", facts)
    if as_json:
        say_json({"kind": "result", **found, "figure": folder / "bench.png"})
        return
    OUT.print(" · ".join(facts), style="dim")
    OUT.print(table(rows, against))
    OUT.print(f"The figure: {folder / 'bench.png'}; the numbers: {folder / 'bench.json'}", soft_wrap=True)


def opened(source: str, dtype: str) -> "Transformer":
    import torch

    from cavelight.model.transformer import Transformer
    from cavelight.spec.presets import preset, preset_names
    from cavelight.train.optim import initialise

    if Path(source).exists() or source not in preset_names():
        return load(Path(source), dtype)[0]
    model = Transformer(preset(source), torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    initialise(model, STD, SEED)
    return model


def peer_of(source: str, model: "Transformer", scratch: Path) -> "Peer":
    """transformers on the same weights; those of a preset are written for it."""
    from cavelight.bench.peer import Transformers
    from cavelight.disk import checkpoint_folder
    from cavelight.weights.snapshot import write_checkpoint

    if Path(source).exists():
        folder = checkpoint_folder(Path(source))
    else:
        folder = scratch / "model"
        write_checkpoint(model, folder)
    return Transformers(folder, model.config, model.lm_head.weight.dtype)


def table(rows: "Sequence[Row]", against: str | None) -> Table:
    shown = Table("", "tokens/s", "ms a step", "of bandwidth", "of peak", box=None)
    if against:
        shown.add_column(f"{against}, tokens/s")
        shown.add_column("times")
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        ours, theirs = row.ours, row.theirs
        cells = [
            ours.case.name,
            f"{ours.tokens_per_second:,.1f}",
            f"{1e3 * ours.typical:,.1f}",
            f"{row.bandwidth_share:.0%}",
            f"{row.peak_share:.0%}",
        ]
        if against:
            cells += [f"{theirs.tokens_per_second:,.1f}", f"{row.ratio:.1f}"] if theirs else ["–", "–"]
        shown.add_row(*cells)
    return shown
