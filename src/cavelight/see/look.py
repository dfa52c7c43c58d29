"""`look`: inside a checkpoint. Its weights are read once; a page and pictures then show what they hold."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cavelight.disk import folder_beside
from cavelight.errors import UserError
from cavelight.see.architecture import draw_architecture
from cavelight.see.experts import expert_norms, routing_bias
from cavelight.see.figure import Figure, number, plain
from cavelight.see.latents import latent, query_latent
from cavelight.see.magnitudes import norm_weights, not_finite, parameters_table, weight_spread
from cavelight.see.measure import Measures, measure
from cavelight.see.page import page
from cavelight.see.plates import draw_figure, is_drawn
from cavelight.see.prediction import mtp_against_trunk
from cavelight.see.style import short as amount
from cavelight.spec.events import Event, Phase
from cavelight.weights.files import abbreviated
from cavelight.weights.stored import Checkpoint

PAGE, DATA = "index.html", "look.json"
PARTS = (
    not_finite,
    parameters_table,
    routing_bias,
    expert_norms,
    latent,
    query_latent,
    mtp_against_trunk,
    norm_weights,
    weight_spread,
)


def look(checkpoint: Checkpoint, out: Path, on_event: Callable[[Event], None] = lambda event: None) -> Path:
    """Write a page, pictures and their data into the folder `out`; returns the page's path.

    The folder appears when all is there; what `look` wrote there before is replaced, anything else is not. Raises
    UserError for a folder that holds other things, for tensors that do not fit the configuration, and for full disks.
    """
    _check_place(out)
    checkpoint.config.check_latent("The look inside")
    found = measure(checkpoint, on_event)
    shown = figures(found)
    drawn = [figure for figure in shown if is_drawn(figure)]
    with folder_beside(out) as folder:
        draw_architecture(found.config, folder / "architecture.png", _name(checkpoint))
        draw_architecture(found.config, folder / "architecture.svg", _name(checkpoint))
        for count, figure in enumerate(drawn):
            on_event(Phase("drawing", count, len(drawn), "figures"))
            draw_figure(figure, folder / f"{figure.key}.png")
        content = data(found, shown, checkpoint)
        (folder / DATA).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        svg = (folder / "architecture.svg").read_text(encoding="utf-8")
        (folder / PAGE).write_text(page(content, shown, svg), encoding="utf-8")
    on_event(Phase("drawing", len(drawn), len(drawn), "figures"))
    return out / PAGE


def figures(found: Measures) -> tuple[Figure, ...]:
    """All that this model has something to show of."""
    return tuple(figure for part in PARTS if (figure := part(found)) is not None)


def data(found: Measures, shown: tuple[Figure, ...], checkpoint: Checkpoint) -> dict[str, Any]:
    """What look.json holds, and the page's script reads: names, facts, and every figure with its numbers."""
    return {
        "checkpoint": _name(checkpoint),
        "facts": _facts(found, checkpoint),
        "notes": list(found.notes),
        "absent": _absent(found),
        "figures": [plain(figure) for figure in shown],
    }


def _facts(found: Measures, checkpoint: Checkpoint) -> list[str]:
    config = found.config
    facts = [config.model_type, number(config.num_hidden_layers, "layer")]
    if config.num_nextn_predict_layers:
        facts.append(number(config.num_nextn_predict_layers, "MTP module"))
    total = sum(summary.count for name, summary in found.summaries.items() if not found.tensors[name].is_copy)
    facts.append(f"{amount(total)} parameters")
    dtypes = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in found.tensors})
    form = checkpoint.format
    kind = {"plain": " and ".join(dtypes), "fp8": "block-fp8", "int": f"int{form.bits}"}[form.kind]
    return [*facts, f"{amount(sum(found.stored_bytes.values()), ' ')}B as {kind}"]


def _absent(found: Measures) -> list[str]:
    config = found.config
    has_experts = any(config.is_moe(layer) for layer in found.layers)
    absent = {
        "It has no experts, so there is nothing to show of routing.": not has_experts,
        "Its routers have no bias: they choose by scores alone.": has_experts and config.topk_method != "noaux_tc",
        "Its queries are not compressed, so there is no latent of theirs.": config.q_lora_rank is None,
        "It has no MTP module.": not config.num_nextn_predict_layers,
    }
    return [sentence for sentence, is_absent in absent.items() if is_absent]


def _name(checkpoint: Checkpoint) -> str:
    """What to call it: its folder, or of a run's model/ the run's."""
    folder = checkpoint.folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def _written(out: Path) -> set[str]:
    """Names of the files that an earlier look wrote into a folder, as its data tells; none where it tells nothing."""
    try:
        found = json.loads((out / DATA).read_text(encoding="utf-8"))
        keys = [figure["key"] for figure in found["figures"]]
    except (OSError, ValueError, LookupError, TypeError):
        return set()
    return {PAGE, DATA, "architecture.png", "architecture.svg", *(f"{key}.png" for key in keys)}


def _check_place(out: Path) -> None:
    """Before hours of reading: that `out` can be written, and holds nothing but what an earlier look wrote.

    Replacing a folder deletes what is in it.
    """
    above = next(folder for folder in out.resolve().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(
            f"{out} cannot be written",
            got=f"{above} is {'a folder that you may not write to' if above.is_dir() else 'no folder'}",
            do="choose another place with --out",
        )
    if not out.exists():
        return
    names = sorted(file.name for file in out.iterdir()) if out.is_dir() else [out.name]
    if strangers := sorted(set(names) - _written(out)):
        raise UserError(
            f"{out} holds something other than the pictures of a checkpoint",
            got=abbreviated(strangers),
            why="looking replaces the whole folder",
            do="choose a new folder with --out",
        )
