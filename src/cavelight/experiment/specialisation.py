"""(d) Sequence-wise against batch-wise balance: loss, and the experts' load on three kinds of text (figure 9 in small).

Letters: T tokens, M MoE layers of the trunk, E experts.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cavelight.data.batches import evaluation_windows
from cavelight.data.store import TokenStore
from cavelight.experiment.balance import max_vio
from cavelight.experiment.page import plus_minus, verdict
from cavelight.experiment.study import Listener, Outcome, Run, Told
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.see import style
from cavelight.see.series import Floats
from cavelight.spec.events import Phase
from cavelight.spec.recipe import Recipe
from cavelight.train.evaluate import held_out_bits_per_byte
from cavelight.train.prepare import prepare
from cavelight.train.state import RunFolder
from cavelight.weights.snapshot import read_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

LOAD_BYTES = 100_000  # of each kind's held-out text, to see where it is sent
NAMES = {"debian-reference-en": "English", "debian-reference-ja": "Japanese", "stdlib": "code"}


def measure(recipe: Recipe, folder: RunFolder, on_event: Listener) -> dict[str, Any]:
    """Of each kind of text: bits per byte, and how often each expert of each layer was chosen."""
    model, context = read_checkpoint(folder.model), recipe.data.row_length
    kinds = prepare(recipe, lambda event: None).held_of
    found: dict[str, Any] = {"kinds": {}}
    for number, (source, held) in enumerate(kinds.items()):
        on_event(Phase("looking at each kind of text", number, len(kinds), "kinds"))
        loads = load(model, held, context).tolist()
        found["kinds"][_name(source)] = {"bits_per_byte": held_out_bits_per_byte(model, held, context), "loads": loads}
    return found


@torch.inference_mode()
def load(model: Transformer, held: TokenStore, context: int) -> Floats:
    """Each expert's share of its layer's choices, over an even share: [M, E]."""
    batches, _ = evaluation_windows(held, context, context, tokens_per_batch=4096, limit_bytes=LOAD_BYTES)
    counts: list[torch.Tensor] = []
    for batch in batches:
        _, routings = model(batch.tokens_T, batch.positions_T, PackedAttend(batch.segments), GroupedDispatch())
        counts.append(torch.stack([routing.counts() for routing in routings]))
    counts_ME = torch.stack(counts).sum(dim=0).double()
    return np.asarray((counts_ME / counts_ME.mean(dim=1, keepdim=True)).numpy())


def loads_of(run: Run, kind: str) -> Floats:
    return np.array(run.found["kinds"][kind]["loads"])


def unevenness(run: Run) -> float:
    """Mean of |relative load - 1| over experts, layers and kinds of text."""
    return float(np.mean([np.abs(loads_of(run, kind) - 1) for kind in run.found["kinds"]]))


def special(run: Run) -> float:
    """Mean distance of an expert's relative load on one kind from its mean over the kinds: 0 where all go alike."""
    loads = np.stack([loads_of(run, kind) for kind in run.found["kinds"]])
    return float(np.abs(loads - loads.mean(axis=0)).mean())


def mean_bits(run: Run) -> float:
    """Bits per byte, each kind counting alike."""
    return float(np.mean([kind["bits_per_byte"] for kind in run.found["kinds"].values()]))


def tell(outcome: Outcome) -> Told:
    first, *others = outcome.study.variants
    kinds = list(outcome.runs[first.key][0].found["kinds"])
    each_kind = (f"bits per byte, {kind}" for kind in kinds)
    head = ("balanced by", *each_kind, "mean", "unevenness", "specialisation", "MaxVio")
    rows = []
    for variant in outcome.study.variants:
        each = [outcome.of(variant.key, partial(_bits_of, kind=kind)) for kind in kinds]
        mean, uneven = outcome.of(variant.key, mean_bits), outcome.of(variant.key, unevenness)
        loads = (plus_minus(uneven, 3), plus_minus(outcome.of(variant.key, special), 3))
        violation = plus_minus(outcome.of(variant.key, max_vio), 2)
        rows.append((variant.label, *map(plus_minus, each), plus_minus(mean), *loads, violation))
    said = []
    for variant in others:
        said.append(verdict(outcome.difference(variant.key, mean_bits), variant.label, first.label, "bits per byte"))
        apart = outcome.difference(variant.key, special)
        said.append(verdict(apart, variant.label, first.label, "specialisation", less="less", digits=3))
    return Told((head, *rows), said)


def draw(outcome: Outcome, path: Path) -> None:
    """Relative loads of the first seed, as in figure 9: experts of two runs have nothing to do with one another."""
    variants = outcome.study.variants
    runs = {variant.label: outcome.runs[variant.key][0] for variant in variants}
    kinds = list(next(iter(runs.values())).found["kinds"])
    layers = len(loads_of(next(iter(runs.values())), kinds[0]))
    most = max(float(loads_of(run, kind).max()) for run in runs.values() for kind in kinds)
    dense = variants[0].config.num_hidden_layers - layers
    width, height = 3.3, 0.24 * len(kinds)
    with style.sheet(path, 9.0, 0.95 + len(runs) * (height + 0.55)) as figure:
        facts = ["relative load: 1 is an even share", "columns: experts", "seed 0"]
        style.heading(figure, "Where each kind of text is sent", facts)
        for row, (label, run) in enumerate(runs.items()):
            for column, layer in enumerate((0, layers - 1)):
                top = 1.05 + row * (height + 0.55)
                axes = style.panel(figure, 0.95 + column * (width + 0.35), top, width, height)
                loads = np.stack([loads_of(run, kind)[layer] for kind in kinds])
                image = _heat(axes, loads, most)
                style.entitle(axes, label, f"layer {dense + layer}", grid=None)
                axes.set_yticks(range(len(kinds)), kinds if column == 0 else [""] * len(kinds))
                axes.set_xticks([])
        last = 1.05 + (len(runs) - 1) * (height + 0.55)
        bar = figure.colorbar(image, cax=style.panel(figure, 8.1, 1.05, 0.1, last + height - 1.05))
        bar.outline.set_visible(False)
        bar.set_ticks([0, 1, *range(2, int(most) + 1, max(1, int(most) // 4))])
        bar.ax.tick_params(length=0, pad=4)


def _heat(axes: "Axes", loads: Floats, most: float) -> "AxesImage":
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(1.0, 0.0, max(most, 1.1))
    image = axes.imshow(loads, cmap=style.diverging(), norm=norm, aspect="auto", interpolation="none")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, labelcolor=style.INK)
    axes.vlines(np.arange(loads.shape[1] - 1) + 0.5, -0.5, len(loads) - 0.5, color=style.GROUND, linewidth=0.8)
    axes.hlines(np.arange(len(loads) - 1) + 0.5, -0.5, loads.shape[1] - 0.5, color=style.GROUND, linewidth=0.8)
    return image


def _bits_of(run: Run, kind: str) -> float:
    return float(run.found["kinds"][kind]["bits_per_byte"])


def _name(source: str) -> str:
    """What to call a source: NAMES has some, others go by the name of their file or folder."""
    last = Path(source).name
    return NAMES.get(last.partition("+")[0], last)
