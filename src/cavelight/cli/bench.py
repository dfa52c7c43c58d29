"""`cavelight bench`: how fast a model runs here, and which share of what the machine could do that is."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.table import Table

from cavelight.cli.evaluation import beside, write_json
from cavelight.cli.generation import dtype_of
from cavelight.cli.progress import screen
from cavelight.cli.screen import ERR, OUT, say_json
from cavelight.disk import checkpoint_folder, clear_disk_errors
from cavelight.errors import UserError
from cavelight.spec.events import Note

if TYPE_CHECKING:
    import torch

    from cavelight.bench.sweep import LeftOut, Row
    from cavelight.model.transformer import Transformer
    from cavelight.spec.config import ModelConfig

SEED = 0  # of the random weights of a preset
STD = 0.02


def bench(
    source: str,
    prompts: str,
    depths: str,
    batches: str,
    against: str | None,
    program: Path | None,
    out: Path | None,
    dtype: str,
    cache: str,
    without_mtp: bool,
    as_json: bool,
) -> None:
    """`source`: a run, a checkpoint, or the name of a preset, which is measured with random weights.

    program: of the peer, where it is not found by itself.
    """
    from cavelight.bench.peers.catalogue import named as peer_named
    from cavelight.bench.peers.subject import Subject
    from cavelight.bench.sweep import cases, sweep
    from cavelight.model.ports import GroupedDispatch
    from cavelight.run.quick import quick, why_plain
    from cavelight.run.rows import cache_dtype, named

    if program and not against:
        raise UserError("--peer is the program of a peer, and none is named", got=str(program), do="add --against PEER")
    opener = peer_named(against, program) if against else None
    wanted = numbers("--prompts", prompts), numbers("--depths", depths, least=0), numbers("--batches", batches)
    rows_in = named(cache)
    model, checkpoint = opened(source, dtype, without_mtp)
    kept_in = cache_dtype(model.config, model.lm_head.weight.dtype, rows_in)
    chosen, left_out = cases(model.config, kept_in, *wanted)
    if not chosen:
        why = "; ".join(f"{each.case.name}: {each.why}" for each in left_out) or "no prompt and no depth was given"
        raise UserError("There is nothing to measure", why=why, do="choose other --prompts and --depths")
    folder = out or (beside(Path(source)) if Path(source).exists() else Path("."))
    with TemporaryDirectory() as scratch, screen(f"Measuring {source}", as_json) as listen:
        with clear_disk_errors(folder):  # now, not after all that measuring
            folder.mkdir(parents=True, exist_ok=True)
        for each in left_out:
            listen(Note(f"Left out: {each.case.name}, since {each.why}."))
        subject = Subject(model, checkpoint, Path(scratch))
        with opener(subject) if opener else nullcontext() as peer:
            rows = sweep(model, chosen, peer, listen, cache=kept_in)
            beside_it = (peer.name, peer.version) if peer else None
    without_native = why_plain(quick(model), GroupedDispatch())
    report(source, model.lm_head.weight.dtype, kept_in, rows, left_out, without_native, beside_it, folder, as_json)


def report(
    source: str,
    dtype: "torch.dtype",
    kept_in: "torch.dtype",
    rows: "Sequence[Row]",
    left_out: "Sequence[LeftOut]",
    without_native: str | None,
    against: tuple[str, str] | None,
    folder: Path,
    as_json: bool,
) -> None:
    """bench.json and bench.png in `folder`, and a table on the screen. against: the peer's name and version."""
    from cavelight.bench.picture import draw_bench
    from cavelight.train.provenance import machine

    probes = rows[0].probes
    found = {
        "model": source,
        "machine": machine(dtype),
        "cache": str(kept_in).removeprefix("torch."),
        "probes": {"read": probes.read, "float32": probes.float32, "bfloat16": probes.bfloat16},
        "cases": [row.as_dict() for row in rows],
        "without_native": without_native,
        "peer": {"name": against[0], "version": against[1]} if against else None,
        "left_out": [{"name": each.case.name, "why": each.why} for each in left_out],
    }
    write_json(folder / "bench.json", found)
    facts = [machine(dtype), f"reads {probes.read / 1e9:.1f} GB/s", f"peak {probes.peak / 1e12:.2f} Tflop/s"]
    draw_bench(rows, folder / "bench.png", f"What a token of {Path(source).resolve().name} costs", facts)
    facts += [f"cache in {found['cache']}"] if kept_in != dtype else []
    facts += [" ".join(against)] if against else []
    facts += [f"without native layers: {without_native}"] if without_native else []
    if as_json:
        say_json({"kind": "result", **found, "figure": folder / "bench.png"})
        return
    OUT.print(" · ".join(facts), style="dim")
    OUT.print(table(rows, against[0] if against else None))
    OUT.print(f"The figure: {folder / 'bench.png'}; the numbers: {folder / 'bench.json'}", soft_wrap=True)


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """What was written after an option, as in 512,4k."""
    from cavelight.plan.table import tokens_of

    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            found.append(0 if part == "0" and least == 0 else tokens_of(part))
        except UserError:
            why = f"it takes whole numbers from {least} on"
            raise UserError(f"{option} cannot be used", got=text, why=why, do="write for example 512,4k") from None
    return found


def opened(source: str, dtype: str, without_mtp: bool) -> "tuple[Transformer, Path | None]":
    """The model, and the folder that it was read from, whether or not there is a tokenizer in it; None of a preset."""
    import torch

    from cavelight.spec.presets import preset, preset_names
    from cavelight.weights.hub import local_folder
    from cavelight.weights.snapshot import read_checkpoint

    numbers_in = dtype_of(dtype)
    if source in preset_names() and not Path(source).exists():
        changes = {"num_nextn_predict_layers": 0} if without_mtp else {}
        return random_model(preset(source).replace(**changes), numbers_in or torch.float32), None
    with ERR.status(f"loading {source}"):
        folder = checkpoint_folder(local_folder(source))
        return read_checkpoint(folder, numbers_in, without_mtp=without_mtp), folder


def random_model(config: "ModelConfig", dtype: "torch.dtype") -> "Transformer":
    """Raises UserError where memory is too small for it."""
    from cavelight.memory import check_memory
    from cavelight.model.transformer import Transformer
    from cavelight.spec.shapes import parameters
    from cavelight.train.optim import initialise

    sizes = [parameter.size for parameter in parameters(config)]
    drawn = 8 * max(sizes)  # in float32, and times the deviation
    check_memory(sum(sizes) * dtype.itemsize + drawn, "this model", "choose a smaller preset, or --dtype bfloat16")
    model = Transformer(config, dtype)
    initialise(model, STD, SEED)
    return model


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
