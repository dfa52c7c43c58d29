"""What the prediction modules look like beside the trunk that they follow.

Letters: D hidden size.
"""

from collections.abc import Callable
from math import isfinite, nan

import numpy as np

from cavelight.see.experts import BIAS
from cavelight.see.figure import Dots, Figure, Floats, Line, Table, listed, number, short
from cavelight.see.measure import Measures

BESIDE = 3  # layers of the trunk that are shown with the modules


def mtp_against_trunk(found: Measures) -> Figure | None:
    """Sizes of weights beside the trunk's last layers, what eh_proj takes from where, and norms, biases, copies."""
    config = found.config
    if not config.num_nextn_predict_layers:
        return None
    trunk = range(max(0, config.num_hidden_layers - BESIDE), config.num_hidden_layers)
    modules = range(config.num_hidden_layers, config.num_layers_with_mtp)
    shares = {layer: halves(found, layer) for layer in modules}
    panels = (_sizes(found, trunk, modules), _halves(found, shares), _facts(found, modules))
    how = (
        "A prediction module joins a hidden state with the embedding of the next token (eh_proj) and runs one layer of "
        "its own; a trained one looks like the layers before it, a fresh or broken one does not."
    )
    return Figure("mtp", "Multi-token prediction beside the trunk", how, _finding(found, modules, shares), panels)


def halves(found: Measures, layer: int) -> tuple[float, float]:
    """Frobenius norms of eh_proj's halves, each with its norm's weight: what comes of embedding and hidden state."""
    at, D = f"model.layers.{layer}", found.config.hidden_size
    squares = found.column_squares[f"{at}.eh_proj.weight"]
    enorm, hnorm = (found.vectors[f"{at}.{name}.weight"] for name in ("enorm", "hnorm"))
    return float((squares[:D] * enorm**2).sum() ** 0.5), float((squares[D:] * hnorm**2).sum() ** 0.5)


def _sizes(found: Measures, trunk: range, modules: range) -> Dots:
    """Standard deviation of each kind of matrix."""
    kinds = [kind for kind in found.kinds if any(found.pooled(layer, kind).count for layer in modules)]
    strengths = np.linspace(0.45, 1.0, len(trunk))
    lines = [
        Line(found.layer_name(layer), _stds(found, layer, kinds), "blue", strength=float(strength))
        for layer, strength in zip(trunk, strengths, strict=True)
    ]
    lines += [Line(found.layer_name(layer), _stds(found, layer, kinds), "amber") for layer in modules]
    return Dots("Size of the weights", "standard deviation", tuple(kinds), tuple(lines), log=True)


def _stds(found: Measures, layer: int, kinds: list[str]) -> Floats:
    return np.array([_std(found, layer, kind) for kind in kinds])


def _std(found: Measures, layer: int, kind: str) -> float:
    """Of all a layer's matrices of one kind; NaN where it has none."""
    return found.pooled(layer, kind).std


def _halves(found: Measures, shares: dict[int, tuple[float, float]]) -> Dots:
    names = [found.layer_name(layer) for layer in shares]
    embedding, hidden = np.array(list(shares.values())).T
    lines = (Line("from the embedding", embedding, "amber"), Line("from the hidden state", hidden, "blue"))
    return Dots("What eh_proj takes", "norm of each half, with enorm's and hnorm's weights", tuple(names), lines)


def _facts(found: Measures, modules: range) -> Table:
    tellers: dict[str, Callable[[int], str]] = {
        "norm before the head, cosine to model.norm": lambda layer: short(norm_cosine(found, layer)),
        "copy of the embedding": lambda layer: _copy(found, layer, "embed_tokens.weight"),
        "copy of the head": lambda layer: _copy(found, layer, "shared_head.head.weight"),
        "enorm, root mean square": lambda layer: _rms(found, layer, "enorm"),
        "hnorm, root mean square": lambda layer: _rms(found, layer, "hnorm"),
        "shared_head.norm, root mean square": lambda layer: _rms(found, layer, "shared_head.norm"),
    }
    if found.vector(modules[0], BIAS) is not None:
        tellers["routing bias, lowest to highest"] = lambda layer: _range(found, layer)
    rows = tuple((name, *(tell(layer) for layer in modules)) for name, tell in tellers.items())
    return Table("In numbers", ("", *(found.layer_name(layer) for layer in modules)), rows)


def norm_cosine(found: Measures, layer: int) -> float:
    """Cosine of the weights of a module's last norm and the trunk's."""
    own, trunk = found.vectors[f"model.layers.{layer}.shared_head.norm.weight"], found.vectors["model.norm.weight"]
    lengths = float(np.linalg.norm(own) * np.linalg.norm(trunk))
    return float(own @ trunk) / lengths if lengths > 0 else nan


def _copy(found: Measures, layer: int, name: str) -> str:
    different = found.copies.get(f"model.layers.{layer}.{name}")
    if different is None:
        return "not stored"
    return f"other in {number(different, 'element')}" if different else "equal"


def _rms(found: Measures, layer: int, name: str) -> str:
    summary = found.of(layer, f"{name}.weight")
    return short(summary.rms) if summary else "not there"


def _range(found: Measures, layer: int) -> str:
    summary = found.of(layer, BIAS)
    return f"{short(summary.low)} to {short(summary.high)}" if summary else "none"


def _finding(found: Measures, modules: range, shares: dict[int, tuple[float, float]]) -> str:
    sentences = []
    last = found.config.num_hidden_layers - 1
    for layer, (embedding, hidden) in shares.items():
        part = hidden**2 / (embedding**2 + hidden**2) if embedding**2 + hidden**2 > 0 else nan
        ratios = [_std(found, layer, kind) / before for kind in found.kinds if (before := _std(found, last, kind)) > 0]
        ratios = [ratio for ratio in ratios if isfinite(ratio)]
        name = found.layer_name(layer)
        sentence = f"{name} takes {part:.0%} of its input from the hidden state and {1 - part:.0%} from the embedding"
        if not isfinite(part):
            sentence = f"What {name} takes from hidden state and embedding cannot be told: it is zero or not finite"
        if ratios:
            extent = f"{short(min(ratios))} to {short(max(ratios))}"
            sentence += f"; its weights are {extent} times as large as those of {found.layer_name(last)}"
        cosine = norm_cosine(found, layer)
        sentence += f"; its last norm has cosine {cosine:.3f} to the trunk's" if isfinite(cosine) else ""
        sentences.append(f"{sentence}.")
    broken = [name for name, different in found.copies.items() if different]
    if broken:
        sentences.append(f"Not the copies that they should be: {listed(broken)}.")
    return " ".join(sentences)
