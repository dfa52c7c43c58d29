"""How much of the latents' rank the weights use, layer by layer.

Letters: C rank of the latent (here also for the queries' Q), L layers with the prediction modules' last.
"""

from collections.abc import Mapping

import numpy as np

from cavelight.see.figure import Curves, Figure, Floats, Line, short
from cavelight.see.measure import Measures
from cavelight.see.spectrum import Spectra, effective_rank, energy_rank, participation_ratio

POINTS = 128  # of a drawn curve of singular values
LEAST = 1e-6  # relative to the largest; here a curve ends


def latent(found: Measures) -> Figure:
    """The latent of keys and values: what is cached."""
    how = (
        "Keys and values of all heads are made from a latent of C numbers a token; a singular value says how strongly "
        "one direction of it is carried from the layer's input through to them, so a curve that falls early means that "
        "a smaller latent might do."
    )
    return _figure(
        found, found.latents, "latent", "How much of the cached latent is used", how, found.config.kv_lora_rank
    )


def query_latent(found: Measures) -> Figure | None:
    """The queries' latent; None where queries are not compressed."""
    if found.config.q_lora_rank is None:
        return None
    how = (
        "Queries too go through a latent, which is not cached but saves weights; it is read like the one above: the "
        "flatter the curve, the more of its directions are in use."
    )
    title = "How much of the queries' latent is used"
    return _figure(found, found.query_latents, "query_latent", title, how, found.config.q_lora_rank)


def _figure(found: Measures, kept: Mapping[int, Spectra], key: str, title: str, how: str, rank: int) -> Figure:
    layers = sorted(kept)
    names = tuple(found.layer_name(layer) for layer in layers)
    through = [kept[layer].through for layer in layers]
    effective_L = np.array([effective_rank(singular) for singular in through])
    energy_L = np.array([energy_rank(singular) for singular in through])
    used = Curves(
        "Directions in use",
        f"of {rank:,}",
        names,
        (
            Line("hold 99% of the energy", energy_L, "blue"),
            Line("effective rank", effective_L, "amber"),
            Line("participation ratio", np.array([participation_ratio(s) for s in through]), "grey", dashed=True),
        ),
        levels=((float(rank), "all"),),
    )
    sides = Curves(
        "Into it, out of it, and through",
        f"effective rank, of {rank:,}",
        names,
        (
            Line("written by its down-projection", _ranks(kept, "written"), "grey"),
            Line("read by its up-projection", _ranks(kept, "read"), "blue", dashed=True),
            Line("through both", effective_L, "amber"),
        ),
        levels=((float(rank), "all"),),
    )
    finding = _finding(names, effective_L, energy_L, rank)
    return Figure(key, title, how, finding, (used, sides, _curves(found, layers, through)))


def _ranks(kept: Mapping[int, Spectra], side: str) -> Floats:
    return np.array([effective_rank(getattr(kept[layer], side)) for layer in sorted(kept)])


def _curves(found: Measures, layers: list[int], through: list[Floats]) -> Curves:
    """Singular values through both projections, one line a layer, the trunk's from pale to strong."""
    rank = len(through[0])
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if rank / step <= POINTS or step == 100)
    places = np.unique([1, *range(step, rank + 1, step), rank])
    trunk = found.config.num_hidden_layers
    ends = {layers[0], trunk - 1}
    lines = []
    for layer, singular in zip(layers, through, strict=True):
        largest = singular[0] if singular[0] > 0 else 1.0
        values = singular[places - 1] / largest
        if (below := np.flatnonzero(values < LEAST)).size:
            values[below[0]], values[below[0] + 1 :] = LEAST, np.nan
        is_mtp = layer >= trunk
        lines.append(
            Line(
                found.layer_name(layer),
                values,
                "amber" if is_mtp else "blue",
                strength=1.0 if is_mtp else (layer + 1) / trunk,
                named=is_mtp or layer in ends,
            )
        )
    names = tuple(str(place) for place in places)
    unit = "relative to the largest, through both projections"
    return Curves(
        "Singular values", unit, names, tuple(lines), across="direction, strongest first", log=True, dots=False
    )


def _finding(names: tuple[str, ...], effective_L: Floats, energy_L: Floats, rank: int) -> str:
    known = np.isfinite(effective_L)
    if not known.any():
        return "Nothing can be said: in every layer some of these weights are not finite."
    least, most = int(np.nanargmin(effective_L)), int(np.nanargmax(effective_L))
    middle = float(np.median(energy_L[known]))
    holes = [name for name, is_known in zip(names, known, strict=True) if not is_known]
    first = f"{names[least]} uses least: an effective rank of {short(float(effective_L[least]))} of {rank:,}"
    first += f", {names[most]} most: {short(float(effective_L[most]))}; in the median layer " if most != least else "; "
    sentence = f"{first}{middle:,.0f} directions hold 99% of the energy."
    if holes:
        sentence += f" Not finite: {', '.join(holes)}."
    return sentence[0].upper() + sentence[1:]
