"""How many weights there are and how large they are: tables by role and layer, norms, standard deviations."""

from collections import Counter
from itertools import groupby
from math import isfinite

import numpy as np

from cavelight.see.figure import Color, Curves, Figure, Floats, Heat, Line, Table, number, shades_of, short
from cavelight.see.measure import Measures
from cavelight.see.style import short as amount
from cavelight.spec.cost import total_parameters

ROLES = {
    "embedding": "embedding",
    "attention": "attention",
    "dense": "dense FFN",
    "expert": "routed experts",
    "shared_expert": "shared experts",
    "gate": "routers",
    "routing_bias": "routing biases",
    "norm": "norms",
    "mtp_projection": "MTP projections",
    "head": "head",
}
NORMS: dict[str, tuple[str, Color]] = {
    "input_layernorm": ("before attention", "blue"),
    "post_attention_layernorm": ("before the feed-forward part", "amber"),
    "self_attn.kv_a_layernorm": ("of the latent", "ink"),
    "self_attn.q_a_layernorm": ("of the queries' latent", "grey"),
}
LINES: dict[str, tuple[Color, bool]] = {
    "attention": ("blue", False),
    "expert": ("amber", False),
    "shared_expert": ("amber", True),
    "dense": ("grey", False),
    "gate": ("ink", True),
}
FRESH = 0.02  # a standard deviation this near to initializer_range, everywhere, is that of a model never trained


def parameters_table(found: Measures) -> Figure:
    """Elements and stored bytes by role, and by layer."""
    counts, sizes = _per_role(found)
    total, stored = sum(counts.values()), sum(sizes.values())
    names = ROLES | {"copy": "MTP's copies"}
    rows = [
        (
            names[role],
            amount(counts[role]),
            f"{counts[role] / total:.1%}",
            _bytes(sizes[role]),
            f"{8 * sizes[role] / counts[role]:.3g}",
        )
        for role in names
        if counts[role]
    ]
    rows.append(("all", amount(total), "100%", _bytes(stored), f"{8 * stored / total:.3g}"))
    roles = Table("By role", ("", "parameters", "share", "stored", "bits each"), tuple(rows), summed=True)
    largest = max(ROLES, key=lambda role: counts[role])
    own = total - counts["copy"]
    what = f"the {ROLES[largest]}" if largest in ("embedding", "head") else ROLES[largest]
    finding = f"{amount(own)} parameters in {_bytes(stored)}: {counts[largest] / own:.0%} of them are {what}."
    if found.config.num_nextn_predict_layers:
        finding += f" {amount(own - total_parameters(found.config))} belong to MTP"
        finding += f"; {amount(counts['copy'])} more are copies of embedding and head." if counts["copy"] else "."
    how = (
        "Every number that is stored, counted by what it is for and by where it sits; packed weights include their "
        "scales, so that bits each tells the format."
    )
    return Figure("parameters", "Where the parameters are", how, finding, (roles, _by_layer(found)))


def _per_role(found: Measures) -> tuple[Counter[str], Counter[str]]:
    counts, sizes = Counter[str](), Counter[str]()
    for name, tensor in found.tensors.items():
        role = "copy" if tensor.is_copy else tensor.parts[0].role
        counts[role] += found.summaries[name].count
        sizes[role] += found.stored_bytes[name]
    return counts, sizes


def _by_layer(found: Measures) -> Table:
    """Runs of layers alike are one row; columns are what a layer consists of."""
    columns = ("attention", "dense", "expert", "shared_expert", "gate", "norm")
    counts = {layer: Counter[str]() for layer in found.layers}
    for name, tensor in found.tensors.items():
        if name.startswith("model.layers.") and not tensor.is_copy:
            layer, role = int(name.split(".")[2]), tensor.parts[0].role
            counts[layer][{"routing_bias": "gate"}.get(role, role)] += found.summaries[name].count
            counts[layer]["stored"] += found.stored_bytes[name]
    shown = [role for role in columns if any(count[role] for count in counts.values())]

    def cells(layer: int) -> tuple[str, ...]:
        count = counts[layer]
        parts = [amount(count[role]) if count[role] else "–" for role in shown]
        whole = sum(size for role, size in count.items() if role != "stored")
        return *parts, amount(whole), _bytes(count["stored"])

    trunk = found.config.num_hidden_layers
    rows = []
    for (_, alike), group in groupby(found.layers, key=lambda layer: (layer >= trunk, cells(layer))):
        layers = list(group)
        first, last = found.layer_name(layers[0]), found.layer_name(layers[-1])
        run = first if len(layers) == 1 else f"{first} to {last.rpartition(' ')[2]}, each"
        rows.append((run, *alike))
    return Table("By layer", ("", *(ROLES[role] for role in shown), "together", "stored"), tuple(rows))


def _bytes(size: int) -> str:
    return f"{amount(size, ' ')}B"


def norm_weights(found: Measures) -> Figure:
    """The weights of all RMSNorms, layer by layer."""
    names = tuple(found.layer_name(layer) for layer in found.layers)
    typical, largest = [], []
    for norm, (word, color) in NORMS.items():
        summaries = [found.of(layer, f"{norm}.weight") for layer in found.layers]
        if not any(summaries):
            continue
        dashed = norm == "self_attn.q_a_layernorm"
        typical.append(Line(word, np.array([s.rms if s else np.nan for s in summaries]), color, dashed))
        extremes = np.array([max(abs(s.low), abs(s.high)) if s and s.finite else np.nan for s in summaries])
        largest.append(Line(word, extremes, color, dashed))
    before_head = found.summaries["model.norm.weight"].rms
    final = ((before_head, "norm before the head"),) if isfinite(before_head) else ()
    panels = (
        Curves("Typical weight", "root mean square", names, tuple(typical), levels=final),
        Curves("Largest weight", "without sign", names, tuple(largest)),
    )
    how = (
        "An RMSNorm brings a vector to length one per number and then multiplies each number by a weight of its own, "
        "which starts at 1; single weights far above the rest belong to channels that the model makes loud."
    )
    return Figure("norms", "Weights of the norms", how, _norms_finding(found), panels)


def _norms_finding(found: Measures) -> str:
    named = {
        name: s
        for name, s in found.summaries.items()
        if name in found.vectors and found.tensors[name].parts[0].role == "norm" and s.finite
    }
    if not named:
        return "No norm has a finite weight."
    high = max(named, key=lambda name: max(abs(named[name].low), abs(named[name].high)))
    low = min(named, key=lambda name: named[name].rms)
    top = max(abs(named[high].low), abs(named[high].high))
    if all(s.low == s.high == 1 for s in named.values()):
        return "All weights are exactly 1: these norms were never trained."

    def named_norm(name: str) -> str:
        parts = name.removesuffix(".weight").split(".", 3)
        return (
            f"{parts[3]} of {found.layer_name(int(parts[2]))}" if parts[1] == "layers" else "the norm before the head"
        )

    negative = sum(int((found.vectors[name] < 0).sum()) for name in named)
    sentence = (
        f"The largest single weight is {short(top)} ({named_norm(high)}); the smallest are those of "
        f"{named_norm(low)}, with a root mean square of {short(named[low].rms)}."
    )
    return sentence + (f" {number(negative, 'weight')} below zero." if negative else "")


def weight_spread(found: Measures) -> Figure:
    """Standard deviation of every kind of matrix, layer by layer, beside what the configuration starts from."""
    names = tuple(found.layer_name(layer) for layer in found.layers)
    start = found.config.initializer_range
    lines = []
    for role, (color, dashed) in LINES.items():
        pools = [found.pooled_role(layer, role) for layer in found.layers]
        if any(pool.count for pool in pools):
            lines.append(Line(ROLES[role], np.array([pool.std for pool in pools]), color, dashed))
    ends = [found.summaries[name].std for name in ("model.embed_tokens.weight", "lm_head.weight")]
    by_role = Curves(
        "By role", "standard deviation", names, tuple(lines), levels=((start, "initializer_range"),), log=True
    )
    kinds = tuple(found.kinds)
    std_KL = np.array([[found.pooled(layer, kind).std for layer in found.layers] for kind in kinds])
    ratio_KL = std_KL / start
    heat = Heat(
        "By matrix",
        "standard deviation over initializer_range",
        kinds,
        names,
        ratio_KL,
        shades_of(np.log2(np.maximum(ratio_KL, 1e-9)), 2.0),
        ("a quarter", "as initialised", "4 times"),
        marks=np.array([[found.pooled(layer, kind).not_finite > 0 for layer in found.layers] for kind in kinds]),
        mark_word="holds NaN or infinity",
        blank=True,
    )
    how = (
        "Weights start as random numbers of standard deviation initializer_range, as the configuration says; training "
        "moves them away from it, more where there was more to learn."
    )
    return Figure(
        "spread", "Size of the weights", how, _spread_finding(kinds, names, ratio_KL, start, ends), (by_role, heat)
    )


def _spread_finding(
    kinds: tuple[str, ...], names: tuple[str, ...], ratio_KL: Floats, start: float, ends: list[float]
) -> str:
    if not np.isfinite(ratio_KL).any():
        return "Nothing can be said: no matrix is finite."
    if np.nanmax(np.abs(ratio_KL - 1)) < FRESH:
        return (
            f"Every matrix lies within {FRESH:.0%} of initializer_range ({short(start)}): this model looks untrained."
        )
    (k, n), (i, j) = (
        np.unravel_index(int(at), ratio_KL.shape) for at in (np.nanargmax(ratio_KL), np.nanargmin(ratio_KL))
    )
    return (
        f"Against initializer_range {short(start)}, the largest is {kinds[k]} of {names[n]} with "
        f"{short(float(ratio_KL[k, n]))} times that, the smallest {kinds[i]} of {names[j]} with "
        f"{short(float(ratio_KL[i, j]))}; the embedding has {short(ends[0])}, the head {short(ends[1])}."
    )


def not_finite(found: Measures) -> Figure | None:
    """Which tensors hold NaN or infinity; None where all is well."""
    if not found.not_finite:
        return None
    most = 50
    worst = sorted(found.not_finite.items(), key=lambda item: -item[1])
    rows = tuple((name, f"{bad:,}", f"{bad / found.summaries[name].count:.2%}") for name, bad in worst[:most])
    finding = (
        f"{number(sum(found.not_finite.values()), 'number')} in {number(len(worst), 'tensor')} "
        f"{'is' if sum(found.not_finite.values()) == 1 else 'are'} NaN or infinite, most in {worst[0][0]}."
    )
    if len(worst) > most:
        finding += f" The {most} worst are listed."
    how = (
        "A single NaN or infinity that takes part in a product spoils all that follows; the figures below leave out "
        "what it touches."
    )
    table = Table("Where they are", ("tensor", "not finite", "share"), rows)
    return Figure("not_finite", "NaN and infinity", how, finding, (table,))
