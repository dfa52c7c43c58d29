"""What the weights tell of the experts: the routers' biases, and how large each expert is beside its layer's others.

Letters: M layers with experts, those of prediction modules last; E experts.
"""

import numpy as np

from cavelight.see.figure import Color, Curves, Figure, Floats, Heat, Line, Panel, listed, number, shades_of, short
from cavelight.see.measure import Measures

BIAS = "mlp.gate.e_score_correction_bias"
COLORS: dict[str, Color] = {"gate_proj": "blue", "up_proj": "amber", "down_proj": "grey"}
ROUTER = "router row"
DEAD, OUTSIZE = 0.01, 3.0  # of a layer's median
MOST_NAMED = 3


def routing_bias(found: Measures) -> Figure | None:
    """The bias of every expert; None for routers without."""
    layers = [layer for layer in found.layers if found.vector(layer, BIAS) is not None]
    if not layers:
        return None
    names = tuple(found.layer_name(layer) for layer in layers)
    bias_ME = np.stack([found.vectors[f"model.layers.{layer}.{BIAS}"] for layer in layers])
    bias_ME = np.where(np.isfinite(bias_ME), bias_ME, np.nan)
    lowest_M, middle_M, highest_M = _ends(bias_ME)
    away_ME = bias_ME - middle_M[:, None]
    limit = float(np.nanmax(np.abs(away_ME), initial=0.0)) or 1.0
    experts = tuple(str(e) for e in range(bias_ME.shape[1]))
    heat = Heat(
        "Bias of each expert",
        "colour: distance from its layer's median",
        names,
        experts,
        bias_ME,
        shades_of(away_ME, limit),
        (f"{short(limit)} below", "median", f"{short(limit)} above"),
        across="expert",
        marks=bias_ME < 0,
        mark_word="below zero",
    )
    spread = Curves(
        "Range of each layer",
        "bias",
        names,
        (
            Line("highest", highest_M, "amber", strength=0.9),
            Line("median", middle_M, "grey"),
            Line("lowest", lowest_M, "blue"),
        ),
        levels=((0.0, "zero"),),
    )
    how = (
        "The router adds an expert's bias to its score when it chooses; training raises it for experts that get too "
        "little to do and lowers it for those that get too much. Only differences within a layer count."
    )
    return Figure("bias", "Routing bias", how, _bias_finding(bias_ME, names), (heat, spread))


def _bias_finding(bias_ME: Floats, names: tuple[str, ...]) -> str:
    known, negative = np.isfinite(bias_ME), int((bias_ME < 0).sum())
    if not known.any():
        return "No bias is a finite number."
    if not bias_ME[known].any():
        return "All biases are zero: balancing by bias has not begun, or the values were lost on the way."
    m, e = np.unravel_index(int(np.nanargmin(bias_ME)), bias_ME.shape)
    if negative:
        first = (
            f"{negative:,} of {known.sum():,} biases {'is' if negative == 1 else 'are'} negative, the lowest "
            f"{short(float(bias_ME[m, e]))} (expert {e} of {names[m]}); engines that shut out expert groups by a score "
            "of 0 may choose other experts then, unless the biases are shifted on export."
        )
    else:
        first = f"No bias is negative; the lowest is {short(float(bias_ME[m, e]))} (expert {e} of {names[m]})."
    lowest_M, _, highest_M = _ends(bias_ME)
    spread_M = highest_M - lowest_M
    widest = int(np.nanargmax(spread_M))
    return f"{first} Experts differ most in {names[widest]}, by {short(float(spread_M[widest]))}."


def expert_norms(found: Measures) -> Figure | None:
    """Norms of every routed expert's matrices and router row against their layer's median; None without experts."""
    layers = [layer for layer in found.layers if found.config.is_moe(layer)]
    if not layers:
        return None
    names = tuple(found.layer_name(layer) for layer in layers)
    experts = tuple(str(e) for e in range(found.config.n_routed_experts or 0))
    norms = {kind: _norms(found, layers, kind) for kind in COLORS}
    norms[ROUTER] = np.stack([found.row_norms[f"model.layers.{layer}.mlp.gate.weight"] for layer in layers])
    ratios = {kind: norm_ME / _median(norm_ME)[:, None] for kind, norm_ME in norms.items()}
    strange = {kind: (ratio_ME < DEAD) | (ratio_ME > OUTSIZE) for kind, ratio_ME in ratios.items()}
    panels: list[Panel] = [
        Heat(
            "Their rows in the router" if kind == ROUTER else f"Their {kind}",
            "norm over its layer's median",
            names,
            experts,
            ratio_ME,
            shades_of(np.log2(np.maximum(ratio_ME, 1e-9)), 1.0),
            ("half", "median", "twice"),
            across="expert",
            marks=strange[kind],
            mark_word="dead or outsize",
        )
        for kind, ratio_ME in ratios.items()
    ]
    panels.append(_sizes(found, layers, names))
    how = (
        "A cell is the Frobenius norm of one expert's matrix, as a multiple of its layer's median: an expert far too "
        f"small (below {DEAD:g}) adds nothing to what others say, it is dead; one far too large (above {OUTSIZE:g}) "
        "drowns them, it is outsize."
    )
    return Figure("experts", "Size of the experts", how, _experts_finding(ratios, strange, names), tuple(panels))


def _norms(found: Measures, layers: list[int], kind: str) -> Floats:
    experts = range(found.config.n_routed_experts or 0)
    at = "model.layers.{}.mlp.experts.{}.{}.weight"
    return np.array([[found.summaries[at.format(layer, e, kind)].norm for e in experts] for layer in layers])


def _sizes(found: Measures, layers: list[int], names: tuple[str, ...]) -> Curves:
    """A weight's size in routed and shared experts: root mean square, so that widths do not matter."""
    shared = [found.of(layer, "mlp.shared_experts.down_proj.weight") for layer in layers]
    count = found.config.hidden_size * found.config.moe_intermediate_size
    rms = {kind: _ends(_norms(found, layers, kind))[1] / count**0.5 for kind in COLORS}
    lines = [Line(f"routed, {kind}", rms[kind], color) for kind, color in COLORS.items()]
    if any(shared):
        for kind, color in COLORS.items():
            summaries = [found.of(layer, f"mlp.shared_experts.{kind}.weight") for layer in layers]
            values = np.array([summary.rms if summary else np.nan for summary in summaries])
            lines.append(Line(f"shared, {kind}", values, color, dashed=True))
    return Curves(
        "A weight of routed and shared experts", "root mean square; of routed the median", names, tuple(lines), log=True
    )


def _experts_finding(ratios: dict[str, Floats], strange: dict[str, np.ndarray], names: tuple[str, ...]) -> str:
    cells = np.argwhere(np.logical_or.reduce(list(strange.values())))
    if len(cells):
        described = [_describe(m, e, ratios, strange, names) for m, e in cells[:MOST_NAMED]]
        more = f" and {len(cells) - MOST_NAMED:,} more" if len(cells) > MOST_NAMED else ""
        total = number(len(cells), "expert")
        return f"{total} {'stands' if len(cells) == 1 else 'stand'} out: {'; '.join(described)}{more}."
    kind = max(ratios, key=lambda kind: float(np.nanmax(np.abs(np.log(ratios[kind])), initial=0.0)))
    away_ME = np.abs(np.log(ratios[kind]))
    if not np.isfinite(away_ME).any():
        return "No norm is a finite number."
    m, e = np.unravel_index(int(np.nanargmax(away_ME)), away_ME.shape)
    everything = np.concatenate([ratio_ME.ravel() for ratio_ME in ratios.values()])
    unknown = int(np.isnan(everything).sum())
    holes = f" {number(unknown, 'norm')} cannot be told, since weights are not finite." if unknown else ""
    low, high = float(np.nanmin(everything)), float(np.nanmax(everything))
    return (
        f"No expert is dead or outsize: all lie between {short(low)} and {short(high)} times their layer's median, "
        f"furthest away the {kind} of expert {e} in {names[m]}.{holes}"
    )


def _describe(m: int, e: int, ratios: dict[str, Floats], strange: dict[str, np.ndarray], names: tuple[str, ...]) -> str:
    kinds = [kind for kind in ratios if strange[kind][m, e]]
    values = [float(ratios[kind][m, e]) for kind in kinds]
    word = "dead" if min(values) < DEAD else "outsize"
    told = listed([f"{kind} at {short(value)}" for kind, value in zip(kinds, values, strict=True)])
    return f"expert {e} of {names[m]} is {word} ({told} times the median)"


def _median(values_ME: Floats) -> Floats:
    """Of each layer, over what is known; never 0, so that it can be divided by."""
    return np.maximum(_ends(values_ME)[1], 1e-30)


def _ends(values_ME: Floats) -> tuple[Floats, Floats, Floats]:
    """Lowest, median and highest of each row, over what is known; NaN where nothing is."""
    rows = [row[np.isfinite(row)] for row in values_ME]
    ends = [(row.min(), np.median(row), row.max()) if len(row) else (np.nan,) * 3 for row in rows]
    lowest, middle, highest = np.array(ends, dtype=np.float64).T
    return lowest, middle, highest
